"""A model run again and again, with finished blocks replaced by recordings."""
