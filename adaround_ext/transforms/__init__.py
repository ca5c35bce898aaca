"""Edits that keep a model's function: batch norms folded, channels equalized."""
