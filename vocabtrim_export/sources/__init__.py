"""What a user calls MODEL, loaded: hub ids, local directories, GGUF files, quantised checkpoints."""
