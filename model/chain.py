"""The language model as a chain: TensorRT segments and plugin operators in order, and the tensors that join them.

`language/chain.json` is this, written out: enough for a runtime to allocate every buffer once and wire everything up. Where
the steps are one engine, it has the names below beside the chain's own.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

VERSION = 1

CURSOR, WANTED = "cursor", "wanted"
"""Inputs of a whole chain as one graph: where its rows go in the cache int32 [1]; rows whose logits are wanted int32 [n]."""

Size = int | str


@dataclass(frozen=True)
class TensorSpec:
    """A tensor between steps: its type and shape, where "rows" is the number of tokens of the pass."""

    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class EngineStep:
    """A segment: files NAME.onnx and NAME.engine, and which tensor of the chain each of its own inputs and outputs is.

    `rows` "last" means that a prefill runs it on the last row of its inputs only; it has no prefill profile.
    """

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: Literal["all", "last"] = "all"
    kind: Literal["engine"] = "engine"


@dataclass(frozen=True)
class OperatorStep:
    """A plugin operator: its inputs and outputs in the chain, where its weights are in rank0.safetensors, its numbers.

    Weights are named as the tensors are below the layer's `attention.` or `mlp.`, and inputs, outputs and attributes as
    in the operator's reference. "moe" is int4_moe over experts that are not INT4.
    """

    operator: str
    layer: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    weights: dict[str, str]
    attributes: dict[str, Any]
    kind: Literal["operator"] = "operator"


Step = EngineStep | OperatorStep


@dataclass(frozen=True)
class Chain:
    """The steps in order, the tensors between them, and what each layer's attention keeps.

    `input` takes the tokens and `output` holds the logits; over `hidden` image embeddings are put. `profiles` are the
    (least, best, most) rows of the engines' optimization profiles, in order; `cache` shapes have "max_seq_len".
    """

    tensors: dict[str, TensorSpec]
    steps: tuple[Step, ...]
    cache: dict[str, TensorSpec]
    profiles: dict[str, tuple[int, int, int]]
    input: str = "tokens"
    hidden: str = "hidden.0"
    output: str = "logits"
    version: int = VERSION

    def to_json(self) -> str:
        """The text of chain.json; the same chain gives the same bytes."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Chain":
        """Read `to_json`'s text. ValueError for another version."""
        raw = json.loads(text)
        if raw["version"] != VERSION:
            raise ValueError(f"chain.json has version {raw['version']}, not {VERSION}")
        tensors, cache = (
            {name: TensorSpec(spec["dtype"], tuple(spec["shape"])) for name, spec in raw[key].items()}
            for key in ("tensors", "cache")
        )
        steps = tuple(EngineStep(**step) if step["kind"] == "engine" else OperatorStep(**step) for step in raw["steps"])
        profiles = {name: (sizes[0], sizes[1], sizes[2]) for name, sizes in raw["profiles"].items()}
        return cls(tensors, steps, cache, profiles, raw["input"], raw["hidden"], raw["output"])

    def caches(self) -> Iterator[tuple[str, str, TensorSpec]]:
        """What attention keeps, in every layer that has some: its input name in a whole graph, its output name, its spec."""
        for step in self.steps:
            if isinstance(step, OperatorStep) and step.operator.endswith("attention"):
                for name, spec in self.cache.items():
                    yield cache_name(name, step.layer), cache_name(name, step.layer) + ".out", spec

    def engines(self) -> Iterator[EngineStep]:
        """The segments, in order."""
        return (step for step in self.steps if isinstance(step, EngineStep))


def cache_name(name: str, layer: int) -> str:
    """The input of a whole graph that is one layer's cache; its output, overwritten in place, has ".out" behind it."""
    return f"cache.{name}.{layer}"


def cache_positions(max_seq_len: int) -> int:
    """Positions of the caches of a whole graph: kernels read them in chunks of up to 64."""
    return -(-max_seq_len // 64) * 64
