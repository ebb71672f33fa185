"""`--k auto`: the K, and the number of slots, that should give the most tokens per second."""
