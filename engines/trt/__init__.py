"""Bundles of `--format trt` made runnable: TensorRT or TensorRT-RTX on an NVIDIA GPU."""
