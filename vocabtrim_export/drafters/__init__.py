"""Heads that read their target's hidden states (EAGLE, multi-token prediction, Medusa): checkpoints and models."""
