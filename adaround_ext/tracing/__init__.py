"""One watched run of a model: calls, operators, blocks, and the way of its rows."""
