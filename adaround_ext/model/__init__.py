"""A whole model, from its first batch to its report."""
