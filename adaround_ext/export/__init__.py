"""Quantized models in the formats that runtimes load; one file a format."""
