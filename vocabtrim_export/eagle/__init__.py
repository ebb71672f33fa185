"""EAGLE-3 heads: their checkpoints in the layouts of several trainers, and one model that runs them all."""
