"""The method: one problem, from the moments of a layer's inputs to its codes."""
