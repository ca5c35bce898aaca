"""The process that the package runs in: whose turn it is, its threads, its memory."""
