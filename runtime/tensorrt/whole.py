"""A language model that is one engine with the plugins inside, over fixed buffers: `ChainProgram`'s twin."""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.model.artifacts import EngineDir
from trtvlm.model.cache import KVCache, LatentCache
from trtvlm.model.chain import CURSOR, WANTED, Chain, cache_name
from trtvlm.plugins.chain_weights import Weights
from trtvlm.runtime.tensorrt.segment import Backend, Graph


class WholeProgram:
    """Launches rank0.engine; what it offers is as in `ChainProgram`.

    Every pass decodes `width` rows, so a row's bits do not depend on how many are asked for; the plugins append them all, and
    those past the wanted ones are overwritten by the next pass. The cache therefore needs `width` positions to spare.
    """

    def __init__(
        self,
        chain: Chain,
        engine: EngineDir,
        backend: Backend,
        weights: Weights,
        cache: KVCache,
        cursor: Tensor,
        most_rows: int,
    ) -> None:
        self.chain = chain
        self.width = chain.profiles["decode"][2]
        self.most_rows = min(most_rows, chain.profiles["prefill"][2])
        device, rows = backend.device, max(self.most_rows, self.width)
        hidden, vocab = (int(chain.tensors[name].shape[1]) for name in (chain.hidden, chain.output))
        dtype: torch.dtype = getattr(torch, chain.tensors[chain.hidden].dtype)
        self._table = weights.get("transformer.vocab_embedding.weight").to(device, dtype)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.hidden = torch.zeros(rows, hidden, dtype=dtype, device=device)
        self.logits = torch.zeros(self.width, vocab, device=device)
        self._wanted = torch.zeros(self.width, dtype=torch.int32, device=device)
        self._all = torch.arange(self.width, dtype=torch.int32, device=device)
        caches = dict(_caches(cache))
        inputs = {chain.hidden: self.hidden, CURSOR: cursor, WANTED: self._wanted, **caches}
        # In and out are one memory: the plugins say so to TensorRT.
        outputs = {chain.output: self.logits, **{f"{name}.out": held for name, held in caches.items()}}
        graph = Graph("rank0", engine.path, inputs, outputs, self.width, frozenset({CURSOR, *caches}))
        (self._segment,) = backend.open([graph])

    def embed(self, rows: int) -> None:
        """The first `rows` tokens -> their rows of `hidden`."""
        torch.index_select(self._table, 0, self.tokens[:rows], out=self.hidden[:rows])

    def prefill(self, rows: int, span: int) -> None:
        """The first `rows` rows of `hidden` -> the cache, and logits [0] after the last of them."""
        self._wanted[:1].fill_(rows - 1)
        self._segment.run(rows)

    def decode(self, rows: int, span: int) -> None:
        """The first `rows` tokens -> the cache, and that many rows of logits."""
        self.embed(self.width)
        self._wanted.copy_(self._all)
        self._segment.run(self.width, decode=True)


def _caches(cache: KVCache) -> list[tuple[str, Tensor]]:
    """Each layer's caches by the graph's names."""
    out = []
    for layer, held in enumerate(cache.layers):
        parts = (
            {"latent": held.latent, "k_pe": held.k_pe} if isinstance(held, LatentCache) else {"k": held.k, "v": held.v}
        )
        out += [(cache_name(name, layer), tensor[0]) for name, tensor in parts.items()]
    return out
