"""The same language model in Hugging Face's transformers, bf16 with random weights: what a decode step takes there.

    python -m trtvlm.runtime.cuda.measure_baselines deepseek-vl2-small 1024 60 direct

Run as a process of its own, which prints a line of JSON for each way it was tried. A step is one token of batch 1: its id in,
the argmax of its logits out, on a static cache. What cannot be run is a line with the reason.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trtvlm.model.errors import UserError, first_line
from trtvlm.model.sizes import language_size
from trtvlm.runtime.cuda.child import lines_of
from trtvlm.runtime.cuda.measure import Clock, CudaClock, Launch, Spread, captured, replay_times

if TYPE_CHECKING:
    from trtvlm.model.config import LanguageConfig

MODULE = "trtvlm.runtime.cuda.measure_baselines"
TIMEOUT = 150.0
REPLAYS = 60
DIRECT, COMPILED = GROUPS = ("direct", "compiled")
SPARE = 128
"""Positions of the static cache beyond the context; every one is attended to, or masked at the same cost."""


def measure_baselines(name: str, context: int, timeout: float = TIMEOUT) -> list[dict[str, Any]]:
    """One entry for each way: {"name", "ms" (a Spread), "seconds"} or {"name", "failed"}; in `timeout` seconds altogether.

    A failed capture can leave a process unusable, so what is compiled has one of its own.
    """
    until, entries = time.monotonic() + timeout, []
    for group in GROUPS:
        left = max(1.0, until - time.monotonic())
        found, reason = lines_of(MODULE, [name, str(context), str(REPLAYS), group], left)
        entries += found
        if reason is not None:
            entries.append({"name": f"transformers, {group}", "failed": f"the process ended early: {reason}"})
        if any(entry.get("none") for entry in found):
            break
    return entries


def transformers_config(config: LanguageConfig) -> Any:
    """The configuration of transformers' own class for these sizes. UserError: there is none."""
    if not config.use_mla:
        raise UserError("transformers has no class for plain attention with DeepSeek's experts.")
    from transformers import DeepseekV2Config, DeepseekV3Config

    common = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_attention_heads,
        "n_shared_experts": config.n_shared_experts, "n_routed_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok, "first_k_dense_replace": config.first_k_dense_replace,
        "q_lora_rank": config.q_lora_rank, "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim, "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim, "routed_scaling_factor": config.routed_scaling_factor,
        "norm_topk_prob": config.norm_topk_prob, "max_position_embeddings": config.max_position_embeddings,
        "n_group": config.n_group or 1, "topk_group": config.topk_group or 1,
    }  # fmt: skip
    if config.scoring_func == "softmax" and config.topk_method == "greedy" and not config.norm_topk_prob:
        return DeepseekV2Config(**common, topk_method="greedy")
    if config.scoring_func == "sigmoid" and config.topk_method == "noaux_tc":
        return DeepseekV3Config(**common)
    raise UserError(f"transformers has no class that routes by {config.scoring_func} and {config.topk_method}.")


@dataclass
class Baseline:
    """A transformers model, a static cache that holds `context` positions, and the token that a step reads."""

    model: Any
    cache: Any
    token: Tensor
    position: Tensor
    mask: Tensor
    chosen: Tensor

    @classmethod
    def make(cls, config: Any, context: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Baseline:
        """Random weights on the device, the cache filled by a prefill of random tokens."""
        from transformers import AutoModelForCausalLM, StaticCache

        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        cache = StaticCache(config=config, max_cache_len=context + SPARE)
        prompt = torch.randint(config.vocab_size, (1, context), device=device)
        model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        seen = torch.arange(context + SPARE, device=device) <= context
        position = torch.full((1, 1), context, device=device)
        return cls(
            model, cache, token, position, seen[None, None, None], torch.zeros(1, dtype=torch.long, device=device)
        )

    def rewind(self) -> None:
        """Let the next step write where the last one wrote; part of a step, as an answer moves the same counters on."""
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(self.position[0, 0])

    def step(self, forward: Callable[..., Any] | None = None) -> None:
        """One token, greedy."""
        forward = self.model if forward is None else forward
        logits = forward(
            input_ids=self.token, position_ids=self.position, attention_mask=self.mask, past_key_values=self.cache
        ).logits
        self.chosen.copy_(logits[:, -1].argmax(-1))


def ways(
    baseline: Baseline, group: str, capture: Callable[[Launch], Launch]
) -> Iterator[tuple[str, Callable[[], Launch]]]:
    """Each way's name and what makes its replay. transformers' own experts code waits for the host: its capture comes last."""

    def eager(experts: str) -> Launch:
        baseline.model.set_experts_implementation(experts)
        return baseline.step

    def graph(experts: str) -> Launch:
        return capture(eager(experts))

    def compiled() -> Launch:
        baseline.model.set_experts_implementation("batched_mm")
        forward = torch.compile(baseline.model)
        return capture(lambda: baseline.step(forward))

    if group == COMPILED:
        # The kernels of torch.compile's mode "reduce-overhead", which is the default one and a CUDA graph.
        yield "transformers, torch.compile, CUDA graph, batched experts", compiled
        return
    yield "transformers, eager, loop over experts", lambda: eager("eager")
    yield "transformers, eager, grouped experts", lambda: eager("grouped_mm")
    yield "transformers, CUDA graph, grouped experts", lambda: graph("grouped_mm")
    yield "transformers, CUDA graph, batched experts", lambda: graph("batched_mm")
    yield "transformers, CUDA graph, loop over experts", lambda: graph("eager")


@torch.inference_mode()
def measure(
    config: Any,
    context: int,
    replays: int,
    group: str,
    device: str = "cuda",
    clock: Clock | None = None,
    capture: Callable[[Launch], Launch] = captured,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[dict[str, Any]]:
    """One entry for each way, as it is measured."""
    clock = clock or CudaClock()
    baseline = Baseline.make(config, context, device, dtype)
    tokens = torch.randint(config.vocab_size, (replays, 1, 1), device=device)
    for name, make in ways(baseline, group, capture):
        began = time.perf_counter()
        try:
            replay = make()

            def whole(replay: Launch = replay) -> None:
                baseline.rewind()
                replay()

            times = replay_times(whole, baseline.token, tokens, clock, warmup=3)
        except Exception as error:  # every library's own; what is seen is the result
            yield {"name": name, "failed": f"{type(error).__name__}: {first_line(error)}"}
            continue
        made = round(time.perf_counter() - began, 1)
        yield {"name": name, "ms": Spread.of(times).to_dict(), "seconds": made}


def main(name: str, context: str, replays: str, group: str) -> None:
    """Measure, and print an entry a line."""
    try:
        config = transformers_config(language_size(name))
    except (UserError, ImportError) as error:
        print(json.dumps({"name": "transformers", "failed": str(error), "none": True}), flush=True)
        return
    for entry in measure(config, int(context), int(replays), group):
        print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
