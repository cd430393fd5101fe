"""cffi build of the header writer."""
