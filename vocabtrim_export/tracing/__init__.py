"""From a transformers model to a graph of composite operators."""
