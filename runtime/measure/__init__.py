"""Measurement of the loop: benchmarks, sweeps, plans and what they report."""
