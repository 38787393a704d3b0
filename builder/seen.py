"""What the linear layers of a decoder layer are given, as calibration wants it: rows, few of them kept, experts' on demand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trtvlm.model.language import DecoderLayer
from trtvlm.model.moe import MLP, MoE, Router

# Rows a linear layer is calibrated on, at most: more change the scales no more, and the search costs as many.
MAX_ROWS = 4096
# An expert the router sent fewer tokens than this, but some, is calibrated on everyone's.
FEW_TOKENS = 128


class Seen:
    """Records a decoder layer while `total` tokens run through it.

    Of a plain linear layer's inputs, at most MAX_ROWS rows are kept, spread evenly. Of the experts' only what the router
    saw and chose: an expert's rows are made when they are asked for, because all of them together are several times the
    layer's weights.
    """

    def __init__(self, layer: DecoderLayer, total: int) -> None:
        self.expert_tokens: list[int] = []
        self.sparse: list[int] = []
        self.never: list[int] = []
        self._layer = layer
        self._step = -(-total // MAX_ROWS)
        self._count: dict[str, int] = defaultdict(int)
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._tokens: list[Tensor] = []
        self._chosen: list[Tensor] = []
        self._hooks = []
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and ".experts." not in name:
                self._hooks.append(module.register_forward_pre_hook(self._recorder(name)))
            elif isinstance(module, Router):
                self._hooks.append(module.register_forward_hook(self._routed))

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            skipped = -self._count[name] % self._step
            self._count[name] += rows.shape[0]
            self._rows[name].append(rows[skipped :: self._step].clone())

        return record

    def _routed(self, _module: nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, Tensor]) -> None:
        self._tokens.append(args[0])
        self._chosen.append(out[0])

    def finish(self) -> None:
        """Stop recording, and count: `expert_tokens`; the experts with too few (`sparse`) and with none (`never`)."""
        for hook in self._hooks:
            hook.remove()
        for name in list(self._rows):
            self._rows[name] = [torch.cat(self._rows[name])]
        mlp = self._layer.mlp
        if not isinstance(mlp, MoE):
            return
        self._tokens, self._chosen = [torch.cat(self._tokens)], [torch.cat(self._chosen)]
        self.expert_tokens = torch.bincount(self._chosen[0].flatten(), minlength=len(mlp.experts)).tolist()
        self.never = [number for number, count in enumerate(self.expert_tokens) if count == 0]
        self.sparse = [number for number, count in enumerate(self.expert_tokens) if 0 < count < FEW_TOKENS]

    def reached(self, name: str) -> bool:
        """Whether any token came to the linear layer `name`."""
        return not name.startswith("mlp.experts.") or int(name.split(".")[2]) not in self.never

    def rows(self, name: str) -> Tensor:
        """What the linear layer `name` was given: float32 [rows, in], at most MAX_ROWS, spread evenly over it."""
        if not name.startswith("mlp.experts."):
            return self._rows[name][0]
        number, part = name.split(".")[2:]
        x = self._expert_rows(int(number))
        if part != "down_proj":
            return x
        expert = self._layer.get_submodule(f"mlp.experts.{number}")
        assert isinstance(expert, MLP)
        inner: Tensor = nn.functional.silu(expert.gate_proj(x)) * expert.up_proj(x)
        return inner

    def _expert_rows(self, number: int) -> Tensor:
        tokens, chosen = self._tokens[0], self._chosen[0]
        if number in self.never:
            return tokens[:0]
        return _spread(tokens if number in self.sparse else tokens[(chosen == number).any(1)])


def _spread(rows: Tensor) -> Tensor:
    return rows[:: max(1, -(-rows.shape[0] // MAX_ROWS))]
