"""Models of random weights in the shape of real ones, for latency without a download."""
