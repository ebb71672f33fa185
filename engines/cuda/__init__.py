"""CUDA's runtime, through cuda-bindings: streams, memory, graphs."""
