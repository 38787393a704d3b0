"""What a model takes and could do on a GPU, from its configuration alone: bytes, what fits, a floor and a projection."""
