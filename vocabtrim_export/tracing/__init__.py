"""Trace a transformers model as a graph of composite operators."""
