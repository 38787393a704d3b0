"""A linear layer with 4-bit weights, one scale per output row and group of inputs (W4A16, AWQ)."""
