"""Ops: seconds of single ops and of the loop around them, against PyTorch and the memory."""
