"""A layer: seconds, error and memory of optimize_layer."""
