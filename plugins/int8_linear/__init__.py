"""A linear layer with 8-bit weights and one scale an output row (W8A16): the LM head."""
