"""The residual addition and the norm after it, in one pass over the residual stream."""
