"""The decoding kernels of a MoE layer give what its definition gives in float64, whatever rows come together."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from trtvlm.model.config import LanguageConfig
from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.cuda.tiles import int4_tiles
from trtvlm.plugins.cuda.turns import Turns
from trtvlm.plugins.int4_linear.decode import LinearWeight, Norm, add_linear
from trtvlm.plugins.int4_moe import reference
from trtvlm.plugins.int4_moe.bench import random_mlp, weights_of
from trtvlm.plugins.int4_moe.decode import moe_decode
from trtvlm.plugins.int4_moe.layer import DecodeWorkspace, MoEWeights, Tiles
from trtvlm.plugins.int4_moe.reference import Int4MLP, Routing
from trtvlm.plugins.int4_moe.row import dense_row, experts_row

DEVICE = "cuda"
ROWS = (1, 2, 3, 5, 8, 9, 16)
MODELS = (*SIZES, "nano", "nano-draft")
EPS = 1e-6


@dataclass(frozen=True)
class Layer:
    """One layer twice: as its definition takes it, and as the kernels do."""

    norm: Tensor
    experts: Int4MLP
    shared: Int4MLP | None
    weights: MoEWeights
    dense: LinearWeight

    @property
    def hidden(self) -> int:
        return self.norm.shape[0]

    def expected(self, residual: Tensor, index: Tensor | None = None) -> Tensor:
        """residual [M, hidden] -> float64 [M, hidden]; index int64 [M, k] stands in for the choice of experts."""
        x = residual.double()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.norm.double()
        logits = x @ self.weights.router.double().transpose(0, 1).flatten(1).t()
        chosen, weight = self.weights.routing(logits, self.weights.correction_bias)
        if index is not None:
            chosen, weight = index, logits.softmax(-1).gather(1, index).float() * self.weights.routing.scaling
        added: Tensor = reference.int4_experts(x, chosen, weight, self.experts, self.shared)
        return residual.double() + added

    def run(self, residual: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The first rows through the kernels, all buffers spoilt -> residual float32, square sums of 16, [rows, ...]."""
        out, sums = residual[:rows].clone(), square_sums(residual[:rows])
        moe_decode(out, sums, Norm(self.norm, sums, EPS), self.weights, spoilt(self.weights, rows), rows)
        return out, sums

    def run_alone(self, x: Tensor, residual: Tensor, turns: Turns | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One row after attention through the kernels it has for itself -> residual, square sums of 16, router logits."""
        out, (inner, sums) = residual.clone(), torch.full((2, 1, self.hidden // 16), torch.nan, device=DEVICE)
        norm, workspace = Norm(self.norm, inner, EPS), spoilt(self.weights, 1)
        dense_row(x, self.dense, out, norm, self.weights, workspace, turns)
        experts_row(out, sums, norm, self.weights, workspace, turns)
        assert not workspace.done.any()
        assert not workspace.logit_sums.any()
        return out, sums, workspace.logits


def square_sums(residual: Tensor) -> Tensor:
    sums: Tensor = residual.square().unflatten(-1, (-1, 16)).sum(-1)
    return sums


def spoilt(weights: MoEWeights, rows: int) -> DecodeWorkspace:
    """Buffers that hold nothing of use, but for the counters."""
    workspace = DecodeWorkspace.allocate(weights, rows, DEVICE)
    for name, buffer in vars(workspace).items():
        if name not in ("done", "logit_sums"):
            buffer.fill_(torch.nan if buffer.is_floating_point() else -1)
    return workspace


def make(config: LanguageConfig, shared: bool = True, scaled: bool = True) -> Layer:
    torch.manual_seed(0)
    hidden, width, number = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts or 0
    experts = random_mlp(hidden, width, number, DEVICE, scaled=scaled)
    beside = random_mlp(hidden, width * (config.n_shared_experts or 0), None, DEVICE, scaled=scaled) if shared else None
    norm = torch.rand(hidden, device=DEVICE).add(0.5).half()
    return Layer(norm, experts, beside, weights_of(config, experts, beside, DEVICE), projection(config, scaled))


def projection(config: LanguageConfig, scaled: bool) -> LinearWeight:
    """Attention's, as random INT4."""
    inputs = config.num_attention_heads * config.value_head_dim
    codes = torch.randint(-128, 128, (config.hidden_size // 2, inputs), dtype=torch.int8, device=DEVICE)
    scales = torch.rand(config.hidden_size, inputs // 64, device=DEVICE).add(0.5).half() / 5 / inputs**0.5
    return LinearWeight(
        *int4_tiles(codes, scales), torch.rand(inputs, device=DEVICE).add(0.5).half() if scaled else None
    )


def residuals(layer: Layer, rows: int = 16) -> Tensor:
    return torch.randn(rows, layer.hidden, device=DEVICE) * torch.linspace(0.2, 3.0, rows, device=DEVICE).unsqueeze(1)


def assert_close(found: Tensor, residual: Tensor, expected: Tensor) -> None:
    """Row by row, and of what the layer adds alone: the residual stream is larger, and would hide an error."""
    added = expected - residual.double()
    error = ((found.double() - expected).norm(dim=-1) / added.norm(dim=-1)).max().item()
    # Activations are halves twice on the way: each rounds to 2^-12 or so of its size, and errors of many average out.
    assert error < 2e-3


@pytest.mark.parametrize(
    ("routing", "experts", "shared", "words"),
    [
        (Routing(6), 129, 64, "129"),
        (Routing(16), 64, 64, "16 of 64"),
        (Routing(2, groups=4), 8, 64, "groups"),
        (Routing(2), 8, 192, "192"),
    ],
    ids=["experts", "top_k", "groups", "shared"],
)
def test_refuses_what_it_cannot_do(routing: Routing, experts: int, shared: int, words: str) -> None:
    def tiles(*shape: int) -> Tiles:
        codes = torch.empty(*shape, 32, 4, dtype=torch.int32, device="meta")
        return Tiles(codes, torch.empty(*shape, 8, 2, dtype=torch.half, device="meta"))

    fc, proj = tiles(experts, 16, 1), tiles(experts, 4, 2)
    with pytest.raises(ValueError, match=words):
        MoEWeights(
            torch.empty(4, experts, 16, device="meta"), None, routing, fc, proj,
            tiles(2 * shared // 16, 1), tiles(4, shared // 64),
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_same_as_the_definition(model: str) -> None:
    layer = make(language_size(model))
    residual = residuals(layer)
    expected = layer.expected(residual)
    for rows in ROWS:
        out, sums = layer.run(residual, rows)
        assert_close(out, residual[:rows], expected[:rows])
        torch.testing.assert_close(sums, square_sums(out), rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_a_row_does_not_depend_on_the_others(model: str) -> None:
    layer = make(language_size(model))
    residual = residuals(layer)
    alone = [layer.run(residual[row : row + 1], 1) for row in range(len(residual))]
    for rows in ROWS:
        for part, together in enumerate(layer.run(residual, rows)):
            assert torch.equal(together, torch.cat([one[part] for one in alone[:rows]]))


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_a_row_alone_after_attention_has_the_same_bits(model: str) -> None:
    assert_same_alone(make(language_size(model)))


def assert_same_alone(layer: Layer, rows: int = 3, turns: Turns | None = None) -> None:
    """The kernels of a lone row give what `add_linear` and `moe_decode` give; logits, too."""
    x, residual = torch.randn(rows, layer.dense.inputs, device=DEVICE).half(), residuals(layer, rows)
    for row in range(rows):
        out, sums = residual[row : row + 1].clone(), torch.full((1, layer.hidden // 16), torch.nan, device=DEVICE)
        workspace = spoilt(layer.weights, 1)
        add_linear(x[row : row + 1], layer.dense, out, sums, 1)
        moe_decode(out, sums, Norm(layer.norm, sums, EPS), layer.weights, workspace, 1)
        alone = layer.run_alone(x[row : row + 1], residual[row : row + 1], turns)
        for found, expected in zip(alone, (out, sums, workspace.logits), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["nano", "deepseek-vl2"])
@pytest.mark.parametrize(("shared", "scaled"), [(False, True), (True, False)])
def test_a_row_alone_without_a_shared_expert_or_pre_quant_scales(model: str, shared: bool, scaled: bool) -> None:
    assert_same_alone(make(language_size(model), shared, scaled))


def test_square_sums_of_a_row_alone_are_read_while_they_are_made() -> None:
    sums = torch.empty(1, 4)
    with pytest.raises(ValueError, match="before and after"):
        experts_row(torch.empty(1, 64), sums, Norm(torch.empty(64), sums, EPS), None, None)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["nano", "deepseek-vl2"])
@pytest.mark.parametrize(("shared", "scaled"), [(False, True), (True, False), (False, False)])
def test_without_a_shared_expert_or_pre_quant_scales(model: str, shared: bool, scaled: bool) -> None:
    layer = make(language_size(model), shared, scaled)
    residual = residuals(layer)
    for rows in (1, 5, 9):
        assert_close(layer.run(residual, rows)[0], residual[:rows], layer.expected(residual[:rows]))


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["nano", "deepseek-vl2-small"])
def test_all_rows_to_the_same_experts(model: str) -> None:
    layer = make(language_size(model))
    # One direction in all lengths: normalised they are one row, and choose alike.
    residual = residuals(layer, 1) * torch.linspace(1.0, 4.0, 16, device=DEVICE).unsqueeze(1)
    expected = layer.expected(residual)
    for rows in (3, 7, 16):
        assert_close(layer.run(residual, rows)[0], residual[:rows], expected[:rows])


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["nano", "deepseek-vl2-small"])
def test_of_equals_the_lower_index_is_chosen(model: str) -> None:
    layer = make(language_size(model))
    layer = replace(layer, weights=replace(layer.weights, router=torch.zeros_like(layer.weights.router)))
    residual = residuals(layer, 3)
    index = torch.arange(layer.weights.routing.top_k, device=DEVICE).expand(3, -1)
    assert_close(layer.run(residual, 3)[0], residual, layer.expected(residual, index))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 6, 9])
def test_replays_from_a_graph(rows: int) -> None:
    layer = make(language_size("deepseek-vl2"))
    first, second = residuals(layer, rows), residuals(layer, rows)
    out, sums = first.clone(), square_sums(first)
    workspace = spoilt(layer.weights, rows)
    norm = Norm(layer.norm, sums, EPS)
    moe_decode(out, sums, norm, layer.weights, workspace, rows)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe_decode(out, sums, norm, layer.weights, workspace, rows)
    for residual in (second, first, second):
        out.copy_(residual)
        sums.copy_(square_sums(residual))
        graph.replay()
        for found, expected in zip((out, sums), layer.run(residual, rows), strict=True):
            assert torch.equal(found, expected)
        assert not workspace.done.any()
