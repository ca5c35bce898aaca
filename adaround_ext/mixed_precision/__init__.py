"""Mixed precision: which layers hurt at which bits, and the bits to give them."""
