"""Quality: error and seconds of every method, layer by layer and of a whole model."""
