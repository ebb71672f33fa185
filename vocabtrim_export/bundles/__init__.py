"""Bundles written: the files of one bundle, and output directories that appear whole or not at all."""
