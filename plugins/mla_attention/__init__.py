"""Absorbed multi-head latent attention that appends its own latents to the cache."""
