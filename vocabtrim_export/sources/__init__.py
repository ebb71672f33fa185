"""Loads a MODEL: hub ids, local directories, GGUF files, quantised checkpoints."""
