"""The plan: which layers are quantized, with which settings, and which not and why."""
