"""Heads that read their target's hidden states: EAGLE's, multi-token-prediction layers, Medusa's; their checkpoints
in the layouts of several trainers, and the models that run them."""
