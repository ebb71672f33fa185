"""Bundles on ONNX Runtime's CPU."""
