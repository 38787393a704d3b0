"""Attention with (grouped) key and value heads that appends its own keys and values to the cache."""
