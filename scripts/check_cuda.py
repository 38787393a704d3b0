"""Check the CUDA decode path: against float32 over the same quantized weights, and rows against rows.

    python -m trtvlm.scripts.check_cuda [--layers 3] [--tokens 96] [nano nano-draft deepseek-vl2-small ...]

Every model has random weights of the real sizes (the first --layers layers of them). Prints, as JSON lines, the relative
error of each half layer and of the logits, how often the most likely token agrees, and whether the bits of a row are the
same computed with 1 to 16 others. Exits with status 1 if a bound is exceeded.

With --kv-cache int8 the reference caches in codes too; where rounding leaves a latent on the other side of a half, its code is
one apart, so errors are some times those of fp16.

Where two experts' scores are nearly equal, rounding decides which is chosen, and a random model's token is then another one. So
the reference is given the kernels' choices of experts for `error` and `top1`; how many choices differ from its own, and by how
little in score at most, is said beside (`flipped`, `flip_margin`), and the error with its own choices is `error_unforced`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import click
import torch
from torch import Tensor

from trtvlm.model.cache import KVCache
from trtvlm.model.cache_kind import CacheKind, check_cache_kind
from trtvlm.model.config import LanguageConfig
from trtvlm.model.errors import UserError
from trtvlm.model.language import LanguageModel
from trtvlm.model.moe import MoE, Router
from trtvlm.model.sizes import language_size
from trtvlm.plugins.embedding.cuda import embed
from trtvlm.plugins.random_checkpoint import RandomCheckpoint
from trtvlm.runtime.cuda.decode import DecodeProgram
from trtvlm.runtime.cuda.reference import reference_model
from trtvlm.runtime.cuda.weights import load_weights
from trtvlm.scripts.cache_option import kv_cache_option

WIDTHS = (1, 2, 3, 5, 8, 4, 7, 16)
MODELS = ("nano", "nano-draft", "deepseek-vl2-tiny", "deepseek-vl2-small", "deepseek-vl2")
FLIP = 5e-2
"""Standard deviations of a row's scores within which rounding may choose another expert."""
TIE = 6.0
"""Errors of a logit within which two logits are equal, as far as rounding goes."""


def run(program: DecodeProgram, tokens: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Logits float32 [T, V] of tokens int32 [T] decoded in steps of these widths, again and again."""
    cursor = torch.zeros(1, dtype=torch.int32, device=tokens.device)
    rows, at, turn = [], 0, 0
    while at < len(tokens):
        width = min(widths[turn % len(widths)], len(tokens) - at)
        cursor.fill_(at)
        program.logits.fill_(float("nan"))
        program.launch(tokens[at : at + width].clone(), cursor, width, program.cache.max_len, logits=True)
        best = program.found[0][:width].max(1)
        chosen = program.found[1][:width].gather(1, best.indices.unsqueeze(1)).squeeze(1)
        assert torch.equal(chosen.long(), program.logits[:width].argmax(1)), "candidates disagree with the logits"
        rows.append(program.logits[:width].clone())
        at, turn = at + width, turn + 1
    return torch.cat(rows)


def halves(program: DecodeProgram, model: Any, tokens: Tensor, kv_cache: CacheKind) -> dict[str, float]:
    """Relative error of the residual stream after each half layer, for one step of the first 8 tokens."""
    found: dict[str, float] = {}
    expected: list[Tensor] = []
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, a: expected.append(a[0][0])))
        hooks.append(layer.register_forward_hook(lambda _m, _a, out: expected.append(out[0])))
    model.hidden_states(model.model.embed_tokens(tokens[:8].long()).unsqueeze(0), cache_of(model, 8, kv_cache))
    for hook in hooks:
        hook.remove()
    cursor = torch.zeros(1, dtype=torch.int32, device=tokens.device)
    embed(tokens[:8].clone(), program.weights.embedding, program.residual, program.square_sums, 8)
    start = model.model.embed_tokens(tokens[:8].long())
    found["embed"] = error(program.residual[:8], start)
    for index in range(len(model.model.layers)):
        program.launch_attention(index, cursor, 8, program.cache.max_len)
        found[f"{index} attention"] = error(program.residual[:8], expected[2 * index])
        program.launch_mlp(index, 8)
        found[f"{index} mlp"] = error(program.residual[:8], expected[2 * index + 1])
        squares = program.residual[:8].square().unflatten(1, (-1, 16)).sum(-1)
        found[f"{index} squares"] = error(program.square_sums[:8], squares)
    return found


def router_logits(program: DecodeProgram, tokens: Tensor) -> dict[int, Tensor]:
    """The kernels' router logits float32 [T, experts] of each layer with experts, tokens decoded one at a time."""
    cursor = torch.zeros(1, dtype=torch.int32, device=tokens.device)
    found: dict[int, list[Tensor]] = {}
    for at in range(len(tokens)):
        cursor.fill_(at)
        token = tokens[at : at + 1].clone()
        embed(token, program.weights.embedding, program.residual, program.square_sums, 1)
        for index, layer in enumerate(program.weights.layers):
            program.launch_attention(index, cursor, 1, program.cache.max_len)
            program.launch_mlp(index, 1)
            if layer.moe is not None and program.router_logits is not None:
                found.setdefault(index, []).append(program.router_logits[:1].clone())
    return {index: torch.cat(rows) for index, rows in found.items()}


def force(gate: Router, logits: Tensor, flips: list[float]) -> None:
    """Let the reference's router choose as the kernels' logits [T, experts] say; `flips` gets each differing token's margin.

    The margin is between the worst score that the router would have chosen itself and the best one it would not have, where
    the kernels chose otherwise.
    """
    own = gate.choose

    def choose(scores: Tensor) -> tuple[Tensor, Tensor]:
        index = own(logits.sigmoid() if gate.sigmoid else logits.softmax(-1))[0]
        mine = own(scores)[0]
        bias = getattr(gate, "e_score_correction_bias", None)
        ranked = scores if bias is None else scores + bias
        for row in (index.sort(-1).values != mine.sort(-1).values).any(-1).nonzero().flatten().tolist():
            kept, taken = ranked[row, mine[row]].min(), ranked[row, index[row]].min()
            flips.append(float((kept - taken).abs() / scores[row].std()))
        return index, gate.weigh(scores, index)

    gate.choose = choose  # type: ignore[method-assign]


def error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def cache_of(model: LanguageModel, positions: int, kv_cache: CacheKind) -> KVCache | None:
    """What the reference caches in: it reads its latents as the kernels do. None: it reads what it has computed."""
    return None if kv_cache == "fp16" else KVCache(model.config, 1, positions, torch.float32, "cuda", kv_cache)


def expected_logits(model: LanguageModel, tokens: Tensor, kv_cache: CacheKind) -> Tensor:
    """The reference's logits float32 [T, V] of tokens int32 [T]."""
    logits: Tensor = model(model.model.embed_tokens(tokens.long()).unsqueeze(0), cache_of(model, len(tokens), kv_cache))
    return logits[0]


def top1_margin(found: Tensor, expected: Tensor) -> float:
    """How far the reference's best logit is above the one found best, where they differ: the most, in deviations of a row.

    Among so many logits of random weights the best two are at times nearer than the error; 0.0 where all agree.
    """
    best = expected.max(1).values
    instead = expected.gather(1, found.argmax(1, keepdim=True)).squeeze(1)
    return float(((best - instead) / expected.std(1)).max())


def check(
    name: str, config: LanguageConfig, lm_head: str, count: int, seed: int, kv_cache: CacheKind = "fp16"
) -> dict[str, Any]:
    """All of it for one model; the row of the report."""
    started = time.monotonic()
    checkpoint = RandomCheckpoint(config, "int4", lm_head, seed)  # type: ignore[arg-type]
    weights = load_weights(checkpoint)
    cache = KVCache(config, 1, 1024, torch.half, "cuda", kv_cache)
    program = DecodeProgram(weights, cache, 16)
    model = reference_model(checkpoint)
    generator = torch.Generator("cuda").manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (count,), device="cuda", generator=generator).int()
    torch.cuda.synchronize()
    row: dict[str, Any] = {"model": name, "layers": config.num_hidden_layers, "lm_head": lm_head, "kv_cache": kv_cache}
    with torch.inference_mode():
        row["halves"] = {key: float(f"{value:.2e}") for key, value in halves(program, model, tokens, kv_cache).items()}
        single = run(program, tokens, (1,))
        own = expected_logits(model, tokens, kv_cache)
        flips: list[float] = []
        for index, logits in router_logits(program, tokens).items():
            mlp = model.model.layers[index].mlp
            assert isinstance(mlp, MoE)
            force(mlp.gate, logits, flips)
        expected = expected_logits(model, tokens, kv_cache)
        row["error_unforced"] = error(single, own)
        row["flipped"], row["flip_margin"] = len(flips), max(flips, default=0.0)
        row["error"] = error(single, expected)
        row["top1"] = float((single.argmax(1) == expected.argmax(1)).float().mean())
        row["top1_margin"] = top1_margin(single, expected)
        row["finite"] = bool(torch.isfinite(single).all())
        row["same_bits"] = {}
        for widths in [(w,) for w in WIDTHS[1:]] + [WIDTHS]:
            other = run(program, tokens, widths)
            row["same_bits"]["+".join(map(str, widths))] = bool(torch.equal(single, other))
    torch.cuda.synchronize()
    row["seconds"] = round(time.monotonic() - started, 1)
    best = row["top1"] > 0.995 or row["top1_margin"] < TIE * row["error"]
    bounds = row["error"] < 1e-2, best, row["flip_margin"] < FLIP, *row["same_bits"].values()
    row["ok"] = row["finite"] and all(bounds)
    return row


@click.command()
@click.argument("models", nargs=-1)
@click.option("--layers", type=int, default=3, show_default=True, help="Layers of each model; 0: all.")
@click.option("--tokens", type=int, default=96, show_default=True)
@click.option("--lm-head", type=click.Choice(["int8", "fp16", "int4"]), default="int8", show_default=True)
@kv_cache_option
@click.option("--seed", type=int, default=0, show_default=True)
def main(models: tuple[str, ...], layers: int, tokens: int, lm_head: str, kv_cache: CacheKind, seed: int) -> None:
    """Run as a script."""
    good = True
    asked = models or [name for name in MODELS if kv_cache == "fp16" or language_size(name).use_mla]
    check_cache_kind(kv_cache, ((name, language_size(name)) for name in asked))
    for name in asked:
        config = language_size(name)
        if layers:
            config = dataclasses.replace(config, num_hidden_layers=min(layers, config.num_hidden_layers))
        row = check(name, config, lm_head, tokens, seed, kv_cache)
        good = good and row["ok"]
        print(json.dumps(row), flush=True)
        torch.cuda.empty_cache()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    try:
        main()
    except UserError as reason:
        sys.exit(f"error: {reason}")
