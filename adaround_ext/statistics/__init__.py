"""Moments of a layer's inputs, streamed, in a fixed order over processes."""
