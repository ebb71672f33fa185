"""The proof of a written graph: before its bundle is placed, it is run and compared with the original model."""
