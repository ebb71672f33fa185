"""A written graph is run and compared with the model that it was made of, before its bundle is placed."""
