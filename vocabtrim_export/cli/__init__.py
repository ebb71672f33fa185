"""The command line: argument parsing, progress and messages around the public functions."""
