"""A whole model: what stays behind, resuming, ranks, memory."""
