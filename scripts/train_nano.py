"""Train the bundled target, DeepSeek-VL2-nano, to read printed text.

    python -m trtvlm.scripts.train_nano --output runs/nano --minutes 24
    torchrun --nproc-per-node 4 -m trtvlm.scripts.train_nano --output runs/nano --minutes 9

Draws its own pages, follows the curriculum of trtvlm.model.pages, and continues where it stopped when run again with
the same output. Made for one GPU, or several under torchrun; a CPU works for a trial.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trtvlm.draft.shrink import initialise
from trtvlm.model.checkpoint import CheckpointReader, save_model
from trtvlm.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from trtvlm.model.pages.batches import PageBatch, PageBatches, to_float
from trtvlm.model.pages.curriculum import CURRICULUM, stage_at
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.int4_linear.packing import GROUP_SIZE
from trtvlm.plugins.quantized_checkpoint import linears

TOKENIZER = Path(__file__).parent.parent / "model" / "nano" / "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "processor_config.json")
BALANCE_WEIGHT = 0.01


def nano_config() -> ModelConfig:
    """The target's configuration: small tiles and patches, all else as the official models have it."""
    processor = json.loads((TOKENIZER / "processor_config.json").read_text(encoding="utf-8"))
    return ModelConfig(
        vision=VisionConfig(image_size=128, patch_size=8, width=192, layers=6, heads=6, mlp_ratio=4.0),
        projector=ProjectorConfig(input_dim=192, n_embed=256),
        language=LanguageConfig(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=512,
            moe_intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
            n_shared_experts=1,
            n_routed_experts=8,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            q_lora_rank=None,
            kv_lora_rank=128,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
            n_group=1,
            topk_group=1,
            max_position_embeddings=4096,
            bos_token_id=0,
            eos_token_id=1,
        ),
        candidate_resolutions=tuple((w, h) for w, h in processor["candidate_resolutions"]),
        torch_dtype="float16",
    )


def processor_folder(folder: Path, config: ModelConfig) -> Path:
    """Put config.json beside copies of the tokenizer and processor files, all that a Processor needs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


class Int4Rounding:
    """Rounds the weights that an INT4 engine rounds, for one step: the gradient at the rounded weights moves the others.

    A model trained so loses little when it is quantized (straight-through estimator, arXiv 1308.3432).
    """

    def __init__(self, model: DeepseekVL2) -> None:
        names = {
            source.format(expert) + ".weight"
            for index in range(model.config.language.num_hidden_layers)
            for fused in linears(model.config.language, index)
            for source in fused.sources
            for expert in range(fused.experts or 1)
        }
        self.weights: list[Tensor] = [
            p for n, p in model.language.model.layers.named_parameters() if n.partition(".")[2] in names
        ]
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def __enter__(self) -> None:
        self._kept = [weight.detach().clone() for weight in self.weights]
        torch._foreach_copy_(self.weights, [_rounded(weight) for weight in self.weights])

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        torch._foreach_copy_(self.weights, self._kept)
        self._kept = []


def _rounded(weight: Tensor) -> Tensor:
    """The nearest weight that INT4 holds, with scales of the whole range of each group."""
    groups = weight.unflatten(-1, (-1, GROUP_SIZE))
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 7
    rounded: Tensor = (groups / scales).round() * scales
    return rounded.flatten(-2)


@dataclass
class Average:
    """An exponential moving average of the weights: what is saved and evaluated."""

    weights: dict[str, Tensor]
    decay: float = 0.998

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model; faster in the beginning."""
        decay = min(self.decay, (1 + step) / (10 + step))
        names = list(self.weights)
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_([self.weights[n] for n in names], [parameters[n].detach() for n in names], 1 - decay)


def average_gradients(model: nn.Module) -> None:
    """Average the gradients over the processes of a torchrun, in one message; alone, leave them."""
    if not dist.is_initialized():
        return
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def agree(value: float, device: torch.device) -> float:
    """The first process's value, in all of them."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return float(shared)


def loss_of(
    model: DeepseekVL2, batch: PageBatch, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy over the answers, the routers' balance and the share of tokens predicted right."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        pixels = to_float(batch.pixels, dtype)
        logits, balance = model.forward_train(
            batch.input_ids[:, :-1], batch.image_start, pixels, batch.tiles, keep_from=batch.answer_start - 1
        )
    labels = batch.labels()
    flat = logits.float().flatten(0, 1)
    loss = F.cross_entropy(flat, labels.flatten(), ignore_index=-100)
    known = labels.flatten() >= 0
    right = ((flat.argmax(-1) == labels.flatten()) & known).sum() / known.sum()
    return loss, balance, right


def learning_rate(progress: float, step: int, peak: float, decay_from: float) -> float:
    """Linear warm-up over 300 steps, constant, then a cosine to 1% of the peak over the last part."""
    warm = min(1.0, (step + 1) / 300)
    if progress <= decay_from:
        return peak * warm
    part = min(1.0, (progress - decay_from) / (1 - decay_from))
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))


@torch.no_grad()
def read_batch(model: DeepseekVL2, batch: PageBatch, max_new_tokens: int = 520) -> list[list[int]]:
    """Greedy answers of a batch without its truth: token ids up to the end of sequence."""
    features = model.encode_views(to_float(batch.pixels, model.image_newline.dtype).flatten(0, 1))
    images = model.batch_image_embeds(features.unflatten(0, batch.pixels.shape[:2]), batch.tiles)
    ids = batch.prompt_ids
    embeds = model.language.model.embed_tokens(ids)
    embeds[:, batch.image_start : batch.image_start + images.shape[1]] = images
    eos = model.config.language.eos_token_id
    answers = model.generate_greedy(embeds, max_new_tokens, eos)
    return [row[: row.index(eos)] if eos in row else row for row in answers.tolist()]


def evaluate(model: DeepseekVL2, batches: PageBatches, device: torch.device, count: int) -> dict[str, float]:
    """Character error rate of greedy reading on about `count` new pages, blanks and line breaks folded."""
    import jiwer

    from trtvlm.model.processor import Processor

    processor = Processor.from_pretrained(TOKENIZER, model.config)
    truths: list[str] = []
    readings: list[str] = []
    exact = 0
    for batch in batches:
        moved = batch.to(device)
        for text, ids in zip(batch.texts, read_batch(model, moved), strict=True):
            truth, reading = " ".join(text.split()), " ".join(processor.decode(ids).split())
            exact += truth == reading
            if truth:
                truths.append(truth)
                readings.append(reading)
        if len(truths) >= count:
            break
    return {"pages": len(truths), "cer": float(jiwer.cer(truths, readings)), "exact": exact / max(1, len(truths))}


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint and the training state."
)
@click.option(
    "--minutes", type=float, default=24.0, show_default=True, help="Training time in all, earlier runs counted in."
)
@click.option("--workers", type=int, default=15, show_default=True, help="Processes that draw pages, for each GPU.")
@click.option("--lr", type=float, default=1.5e-3, show_default=True, help="Peak learning rate.")
@click.option(
    "--init", type=click.Path(path_type=Path), default=None, help="Begin with the weights of this checkpoint."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=False, help="Compile the layers with torch.compile.")
@click.option("--batch-scale", type=float, default=1.0, show_default=True, help="Multiplies the tokens of a batch.")
@click.option(
    "--int4-share",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the steps taken with INT4 weights, so that quantizing costs less.",
)
@click.option("--max-steps", type=int, default=None, help="Stop after so many steps of this run (for a trial).")
@click.option("--start-stage", type=int, default=None, help="Begin in this stage of the curriculum (for a trial).")
def main(
    output: Path,
    minutes: float,
    workers: int,
    lr: float,
    init: Path | None,
    seed: int,
    compiled: bool,
    batch_scale: float,
    int4_share: float,
    max_steps: int | None,
    start_stage: int | None,
) -> None:
    """Train, evaluate, save."""
    from dataclasses import replace

    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    output.mkdir(parents=True, exist_ok=True)
    folder = output / (f"processor.{rank}" if rank else "processor")
    state_file, log_file = output / "state.pt", output / "training_log.jsonl"
    model = DeepseekVL2(nano_config())
    prompts = processor_folder(folder, model.config)
    initialise(model, seed)
    if init is not None:
        CheckpointReader(init).load_into(model, "")
    model.to(device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.97), fused=device.type == "cuda")
    average = Average({n: p.detach().clone() for n, p in model.named_parameters()})
    step, spent, epoch = 0, 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights = state["average"]
        step, spent, epoch = state["step"], state["spent"], state["epoch"] + 1
        print(f"resuming at step {step}, {spent / 60:.1f} minutes in", flush=True)
    if not rank:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}", flush=True)

    def checkpoint() -> None:
        if rank:
            return
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.weights}
        torch.save(state | {"step": step, "spent": spent, "epoch": epoch}, output / "state.tmp")
        (output / "state.tmp").replace(state_file)

    if compiled:
        for block in model.vision.blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
        for layer in model.language.model.layers:
            layer.forward_train = torch.compile(layer.forward_train, dynamic=True)  # type: ignore[arg-type, assignment]
    stages = tuple(replace(s, batch_tokens=int(s.batch_tokens * batch_scale)) for s in CURRICULUM)
    stage = start_stage if start_stage is not None else stage_at(spent / 60 / minutes)
    batches = PageBatches(prompts, seed + 100_003 * rank, epoch, workers, stage, stages)
    rounding = Int4Rounding(model)
    log = log_file.open("a", encoding="utf-8")
    decay_from = 0.55
    last, seen, pages, first = time.monotonic(), 0, 0, step
    saved = time.monotonic()
    running: list[Tensor] = []
    for batch in batches:
        progress = spent / 60 / minutes
        if progress >= 1 or (max_steps is not None and step - first >= max_steps):
            break
        if start_stage is None:
            batches.set_stage(stage_at(progress))
        batch = batch.to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step, lr, decay_from)
        with rounding if int4_share and step % round(1 / int4_share) == 0 else nullcontext():
            loss, balance, right = loss_of(model, batch, device, dtype)
            (loss + BALANCE_WEIGHT * balance).backward()
        average_gradients(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if bool(torch.isfinite(norm)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model, step)
        running.append(torch.stack((loss.detach(), balance.detach(), right.detach(), norm)))
        step += 1
        seen += batch.input_ids.numel()
        pages += len(batch.texts)
        now = time.monotonic()
        if step == first + 1:
            last, seen, pages = now, 0, 0  # compilation and the first batch's wait are not training time
            continue
        if step % 50 == 0:
            means = torch.stack(running).mean(0).tolist()
            elapsed = now - last
            row = {
                "step": step,
                "minutes": round(spent / 60 + (now - last) / 60, 2),
                "stage": batches.stage,
                "loss": round(means[0], 4),
                "balance": round(means[1], 3),
                "right": round(means[2], 4),
                "norm": round(means[3], 3),
                "lr": optimizer.param_groups[0]["lr"],
                "tokens_s": int(seen / elapsed),
                "pages_s": int(pages / elapsed),
            }
            if not rank:
                print(json.dumps(row), file=log, flush=True)
                if step % 200 == 0:
                    print(json.dumps(row), flush=True)
            spent = agree(spent + elapsed, device)
            last, seen, pages, running = now, 0, 0, []
            if now - saved > 120:
                checkpoint()
                saved = now
    checkpoint()
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(average.weights[name])
    model.eval()
    processor_folder(output / "target", model.config)
    save_model(model, output / "target", torch.float16)
    if max_steps is None:
        from trtvlm.model.pages.curriculum import Stage
        from trtvlm.model.pages.page import PageSpec

        results = {}
        for split in ("train", "heldout"):
            whole = (Stage(1.0, ((PageSpec(fonts=split), 1.0),), 60_000),)
            results[split] = evaluate(model, PageBatches(prompts, 7_000_001, 0, workers, 0, whole), device, 1000)
            print(split, json.dumps(results[split]), flush=True)
        (output / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
