"""The runtime that a model is quantized for: its rules, and refusals before any work."""
