"""Checkpoint in, engine directory out: quantize, export, compile, verify."""
