"""`--kv-cache`, which several commands take."""

import click

from trtvlm.model.cache_kind import CACHE_KINDS

kv_cache_option = click.option(
    "--kv-cache",
    type=click.Choice(CACHE_KINDS),
    default="fp16",
    show_default=True,
    help="How latent attention caches latents: as computed, or in 8 bits, which halves the cache and rounds what is read.",
)
