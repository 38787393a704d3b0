"""int4_moe against the model's own layer with the same rounded weights; both routings."""

import dataclasses
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_config
from trtvlm.model.moe import MLP, MoE, Router
from trtvlm.plugins.int4_linear import packing
from trtvlm.plugins.int4_moe.module import Int4MoE
from trtvlm.plugins.int4_moe.op import int4_moe
from trtvlm.plugins.int4_moe.reference import Routing


def _layer(kind: str, seed: int, shared: int | None = 2) -> MoE:
    config = dataclasses.replace(tiny_config(kind).language, n_shared_experts=shared)
    moe = MoE(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in moe.parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
    return moe


def _round(mlp: MLP) -> None:
    """Give a float MLP the weights its INT4 twin has."""
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        scales = packing.group_scales(linear.weight)
        linear.weight.copy_(packing.dequantize(packing.pack(packing.quantize_int4(linear.weight, scales)), scales))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["mla", "base"]), st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([None, 2]))
def test_equals_the_float_layer_with_rounded_weights(kind: str, seed: int, rows: int, shared: int | None) -> None:
    moe = _layer(kind, seed, shared)
    quantized = Int4MoE.from_float(moe)
    for mlp in (*moe.experts, *([moe.shared_experts] if shared else [])):
        _round(cast(MLP, mlp))
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    # The same products of the same float32 weights, a few hundred additions long.
    torch.testing.assert_close(quantized(x), moe(x), atol=1e-4, rtol=1e-4)


@given(
    st.integers(0, 2**31),
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(1, 1), (4, 2)]),
)
def test_routing_is_the_model_s(seed: int, scoring: str, normalise: bool, bias: bool, groups: tuple[int, int]) -> None:
    changes: dict[str, Any] = {
        "n_routed_experts": 16,
        "num_experts_per_tok": 3,
        "scoring_func": scoring,
        "norm_topk_prob": normalise,
        "topk_method": "noaux_tc" if bias else "greedy",
        "n_group": groups[0],
        "topk_group": groups[1],
        "routed_scaling_factor": 1.5,
    }
    router = Router(dataclasses.replace(tiny_config("mla").language, **changes)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    router.weight.normal_(generator=generator)
    correction = torch.randn(16, generator=generator) if bias else None
    if correction is not None:
        router.e_score_correction_bias.copy_(correction)
    x = torch.randn(5, 64, generator=generator)
    routing = Routing(3, scoring, normalise, 1.5, *groups)
    index, weight = routing(x @ router.weight.t(), correction)
    expected_index, expected_weight = router(x)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(weight, expected_weight)


def test_pre_quant_scales_are_applied_to_both_products() -> None:
    moe = _layer("mla", 0, None)
    plain = Int4MoE.from_float(moe)
    x = torch.randn(4, 64)
    fc_pre, proj_pre = torch.rand(64) + 0.5, torch.rand(64) + 0.5
    scaled = Int4MoE.from_float(moe)
    scaled.fc_pre, scaled.proj_pre = fc_pre, proj_pre
    for mlp in moe.experts:
        mlp = cast(MLP, mlp)
        _round(mlp)
        for linear, pre in ((mlp.gate_proj, fc_pre), (mlp.up_proj, fc_pre), (mlp.down_proj, proj_pre)):
            linear.weight.mul_(pre)
    torch.testing.assert_close(scaled(x), moe(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scaled(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["mla", "base"])
def test_opcheck(kind: str, dtype: torch.dtype) -> None:
    layer = Int4MoE.from_float(_layer(kind, 0))
    weights = [
        getattr(layer, prefix + part)
        for prefix in ("", "shared_")
        for part in ("fc", "fc_scales", "proj", "proj_scales", "fc_pre", "proj_pre")
    ]
    numbers = (2, layer.routing.scoring, True, 1.0, 1, 1)
    torch.library.opcheck(
        int4_moe, (torch.randn(3, 64, dtype=dtype), torch.randn(3, 4), *weights, layer.correction_bias, *numbers)
    )
