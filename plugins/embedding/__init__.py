"""Tokens to the residual stream on the device, where the token may be the draft's choice of a moment before."""
