"""The PyTorch model against golden data of the official code (tests/golden/official/README.md), in float32."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import GOLDEN, tiny_model
from trtvlm.model.cache import KVCache
from trtvlm.model.checkpoint import load_model
from trtvlm.model.vlm import DeepseekVL2

VARIANTS = ("tiny-like", "small-like", "base-like")
INPUTS = ("text", "one_image", "two_images", "three_images", "multi_turn")

# Measured noise of threads, BLAS and float64 is 4e-5 in logits; the smallest wrong detail moves them by 7e-4.
LOGITS_ATOL = 2e-4


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[str, DeepseekVL2]:
    return request.param, load_model(GOLDEN / request.param / "model")


def golden(variant: str, name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / variant / "golden" / f"{name}.safetensors")


def inputs_embeds(model: DeepseekVL2, data: dict[str, Tensor]) -> Tensor:
    pixels = (data["images_u8"].float() / 255 - 0.5) / 0.5 if "images_u8" in data else None
    crops = data["images_spatial_crop"][None] if pixels is not None else None
    return model.embed(
        data["input_ids"][None], data["images_seq_mask"][None], crops, None if pixels is None else pixels[None]
    )


@pytest.mark.parametrize("name", INPUTS)
def test_every_stage_equals_the_official_one(variant: tuple[str, DeepseekVL2], name: str) -> None:
    which, model = variant
    data = golden(which, name)
    if "images_u8" in data:
        pixels = (data["images_u8"].float() / 255 - 0.5) / 0.5
        features = model.vision(pixels)
        torch.testing.assert_close(features, data["vision_features"], atol=2e-5, rtol=0)
        torch.testing.assert_close(model.projector(features), data["projector_output"], atol=2e-6, rtol=0)
    embeds = inputs_embeds(model, data)
    torch.testing.assert_close(embeds[0], data["inputs_embeds"], atol=2e-6, rtol=0)
    logits = model.language(embeds)[0]
    torch.testing.assert_close(logits[data["logit_positions"]], data["prefill_logits"], atol=LOGITS_ATOL, rtol=0)


@pytest.mark.parametrize("name", INPUTS)
def test_greedy_tokens_are_the_official_ones(variant: tuple[str, DeepseekVL2], name: str) -> None:
    which, model = variant
    data = golden(which, name)
    tokens = model.generate_greedy(inputs_embeds(model, data), 32)
    assert tokens[0].tolist() == data["greedy_tokens"].tolist()
    record = json.loads((GOLDEN / which / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    greedy = record["greedy_tokens"]
    stop = record.get("stop_example", {"eos_token_id": greedy[3], "tokens": greedy[:4]})
    stopped = model.generate_greedy(inputs_embeds(model, data), 32, eos_token_id=stop["eos_token_id"])
    assert stopped[0].tolist() == stop["tokens"]


def test_layer_by_layer(variant: tuple[str, DeepseekVL2]) -> None:
    which, model = variant
    data, layers = golden(which, "one_image"), golden(which, "one_image.layers")
    seen: dict[str, Tensor] = {}
    routing: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for index, layer in enumerate(model.language.model.layers):
        for part in ("self_attn", "mlp"):
            name = f"layers.{index}.{part}"
            hooks.append(
                getattr(layer, part).register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
            )
        if hasattr(layer.mlp, "gate"):
            name = f"layers.{index}.mlp.gate"
            hooks.append(
                layer.mlp.gate.register_forward_hook(lambda _m, _i, out, name=name: routing.__setitem__(name, out))
            )
    embeds = inputs_embeds(model, data)
    seen["norm"] = model.language.hidden_states(embeds, observe=lambda i, out: seen.__setitem__(f"layers.{i}", out))
    for hook in hooks:
        hook.remove()
    for name, value in seen.items():
        torch.testing.assert_close(value[0], layers[name], atol=2e-4, rtol=0, msg=name)
    for name, (chosen, weight) in routing.items():
        order, expected_order = chosen.argsort(-1), layers[f"{name}.topk_idx"].argsort(-1)
        assert torch.equal(chosen.gather(1, order), layers[f"{name}.topk_idx"].gather(1, expected_order))
        expected = layers[f"{name}.topk_weight"].gather(1, expected_order)
        torch.testing.assert_close(weight.gather(1, order), expected, atol=2e-5, rtol=0)
    pixels = (data["images_u8"].float() / 255 - 0.5) / 0.5
    patches = model.vision.patch_embed(pixels[:2])
    torch.testing.assert_close(patches, layers["vision.patch_embed"], atol=2e-5, rtol=0)
    x = patches + model.vision.pos_embed
    for index, block in enumerate(model.vision.blocks):
        x = block(x)
        torch.testing.assert_close(x, layers[f"vision.blocks.{index}"], atol=2e-5, rtol=0)


def test_left_padded_batch(variant: tuple[str, DeepseekVL2]) -> None:
    which, model = variant
    data = golden(which, "batch")
    names = ("text", "one_image", "multi_turn")
    images: list[Tensor] = []
    for name in names:
        single = golden(which, name)
        if "images_u8" in single:
            images.append(single["inputs_embeds"][single["images_seq_mask"]])
    embeds = model.embed(data["input_ids"], data["images_seq_mask"].bool(), image_embeds=images)
    mask = data["attention_mask"]
    last = model.language(embeds, attention_mask=mask, last_only=True)[:, -1]
    torch.testing.assert_close(last, data["last_logits"], atol=LOGITS_ATOL, rtol=0)
    tokens = model.generate_greedy(embeds, 8, attention_mask=mask)
    assert tokens.tolist() == data["greedy_tokens"].tolist()


@pytest.mark.parametrize("kind", ["mla", "mha", "base"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_cached_chunks_equal_one_pass(kind: str, chunk: int) -> None:
    model = tiny_model(kind)
    embeds = torch.randn(1, 20, model.config.language.hidden_size, generator=torch.Generator().manual_seed(1))
    whole = model.language(embeds)
    cache = KVCache(model.config.language, 1, 20)
    parts = [model.language(embeds[:, i : i + chunk], cache) for i in range(0, 20, chunk)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-4, rtol=0)
    cache.rollback(11)
    again = model.language(embeds[:, 11:], cache)
    torch.testing.assert_close(again, whole[:, 11:], atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["mla", "mha", "base"])
def test_training_forward_equals_inference(kind: str) -> None:
    model = tiny_model(kind)
    config, tiles = model.config, (2, 1)
    count = config.image_tokens(*tiles)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 500, (2, 3 + count + 9), generator=generator)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 3 : 3 + count] = True
    pixels = torch.rand(2, 3, 3, config.tile_size, config.tile_size, generator=generator) * 2 - 1
    logits, balance = model.forward_train(ids, 3, pixels, tiles, keep_from=5)
    embeds = model.embed(ids, mask, torch.tensor([[tiles], [tiles]]), pixels)
    torch.testing.assert_close(logits, model.language(embeds)[:, 5:], atol=2e-4, rtol=0)
    assert 0.2 < float(balance) < config.language.n_routed_experts  # type: ignore[operator]
