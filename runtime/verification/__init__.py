"""Proof that speculation leaves the target's output as it is, greedy and sampled."""
