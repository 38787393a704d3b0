"""Memory on a card: what models take while they are opened and while they run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtvlm.builder.planner.parts import HEAD, PROJECTOR, VISION, parts, total
from trtvlm.model.cache import KVCache
from trtvlm.model.cache_kind import CacheKind
from trtvlm.model.config import LanguageConfig, ModelConfig
from trtvlm.plugins.gqa_attention import decode as gqa_attention
from trtvlm.plugins.int8_linear.decode import ROWS_AT_ONCE as HEAD_ROWS_AT_ONCE
from trtvlm.plugins.mla_attention import decode as mla_attention
from trtvlm.plugins.quantized_checkpoint import Kind, linears

CARDS_GIB = (8, 12, 24)
# Allowances, not measurements: the CUDA context with its libraries and kernels, and the captured graphs.
CONTEXT_BYTES = 500 << 20
GRAPH_BYTES = 64 << 20
SHARED_BYTES = CONTEXT_BYTES + GRAPH_BYTES
# The kernels attend to so many positions at most.
MOST_POSITIONS = min(gqa_attention.MOST_POSITIONS, mla_attention.MOST_POSITIONS)

_HALF, _FLOAT = 2, 4
_CACHE_STEP = 64
_EXPERTS_AT_ONCE = 4  # runtime/cuda/weights.py repacks so many
_REPACK_BYTES = 16  # of a weight while INT4 is repacked: codes as int32 twice, words as int64, and the orders of both
_HEAD_REPACK_BYTES = 16
_PREFILL_CHUNK = 1024  # rows of a prompt at a time, as runtime/cuda/prefill.py has it
_GRAPHED_ROWS, _GRAPHED_VIEWS = 256, 4  # runtime/cuda/prefill.py and vision.py
_TILE = 64  # widths of weights in half are padded to this


@dataclass(frozen=True)
class Memory:
    """Bytes on the card of one model (target or draft), besides what both share (`SHARED_BYTES`).

    weights: the language model's. vision: tower and projector. cache: keys and values. image: the tower's activations.
    buffers: of decode steps and sampling, and of graphs. prefill: a chunk of a prompt. repacking: while weights are brought
    over, on top of those before.
    """

    weights: int
    vision: int
    cache: int
    image: int
    buffers: int
    prefill: int
    repacking: int

    @property
    def held(self) -> int:
        """As long as it is open."""
        return self.weights + self.vision + self.cache + self.buffers

    @property
    def passing(self) -> int:
        """Besides, at most, before the first token: an image and a prompt are not computed at the same time."""
        return max(self.image, self.prefill)

    @property
    def running(self) -> int:
        """At most, while it answers."""
        return self.held + self.passing

    @property
    def opening(self) -> int:
        """At most, while it is opened: the vision part comes last."""
        return self.weights + self.cache + self.repacking


def card_memory(
    config: ModelConfig,
    kind: Kind,
    lm_head: Kind,
    positions: int,
    views: int,
    rows: int,
    kv_cache: CacheKind = "fp16",
) -> Memory:
    """Of one model with a cache of `positions`, images of up to `views` views, decode steps of up to `rows` rows."""
    language, found = config.language, parts(config, kind, lm_head)
    vision = found[VISION].device_bytes + found[PROJECTOR].device_bytes
    whole = total(found.values()).device_bytes
    return Memory(
        weights=whole - vision,
        vision=vision,
        cache=cache_bytes(language, positions, kv_cache),
        image=image_bytes(config, views),
        # The graphs of a prompt's last rows and of few views keep what they work in.
        buffers=buffer_bytes(language, positions, rows)
        + prefill_bytes(language, min(positions, _GRAPHED_ROWS), kv_cache)
        + image_bytes(config, min(views, _GRAPHED_VIEWS)),
        prefill=prefill_bytes(language, positions, kv_cache),
        repacking=_repacking(language, kind, found[HEAD].checkpoint_bytes),
    )


def needed(memories: list[Memory]) -> int:
    """Bytes a card must have for models that are opened one after the other and then run in turns."""
    most, held = 0, 0
    for memory in memories:
        most = max(most, held + memory.opening)
        held += memory.held
    return SHARED_BYTES + max(most, held + max(memory.passing for memory in memories))


def cache_bytes(config: LanguageConfig, positions: int, kv_cache: CacheKind = "fp16") -> int:
    """The cache, in half but for codes, as the executor allocates it: in steps of 64 positions."""
    steps = min(-(-positions // _CACHE_STEP) * _CACHE_STEP, config.max_position_embeddings)
    layers = KVCache(config, 1, steps, torch.half, "meta", kv_cache).layers
    return sum(tensor.nbytes for layer in layers for tensor in layer.tensors())


def image_bytes(config: ModelConfig, views: int) -> int:
    """The vision part's largest set of live halves, in PyTorch: in an MLP, the block's input, the residual stream and its norm
    (three widths), the first product and its activation (two inner widths), of all patches of all views; and the pixels.
    """
    vision = config.vision
    pixels = 3 * vision.image_size**2
    return _HALF * views * (vision.grid**2 * (3 * vision.width + 2 * vision.mlp_width) + pixels)


def buffer_bytes(config: LanguageConfig, positions: int, rows: int) -> int:
    """What decode steps of `rows` rows work in: the attention's partial results, logits, probabilities of both models."""
    heads, vocabulary = config.num_attention_heads, _FLOAT * rows * config.vocab_size
    if config.use_mla:
        rank, rope = config.kv_lora_rank or 0, config.qk_rope_head_dim
        latent = mla_attention.MLAWorkspace.allocate(rows, positions, heads, rank, rope, "meta")
        attention = latent.queries.nbytes + latent.outputs.nbytes + latent.shares.nbytes
    else:
        plain = gqa_attention.GQAWorkspace.allocate(rows, positions, heads, config.head_dim, "meta")
        attention = plain.outputs.nbytes + plain.shares.nbytes
    rope_tables = 2 * _FLOAT * config.max_position_embeddings * config.rope_dim // 2
    return attention + 3 * vocabulary + rope_tables


def prefill_bytes(config: LanguageConfig, positions: int, kv_cache: CacheKind = "fp16") -> int:
    """The largest set of live tensors while the last chunk of a prompt of `positions` rows is computed, in a layer's half."""
    rows, hidden, heads = min(positions, _PREFILL_CHUNK), config.hidden_size, config.num_attention_heads
    # The residual stream, what the layer before it gave (in float32 and in half), and its norm for two products.
    common = rows * hidden * (_FLOAT + _FLOAT + _HALF + 2 * _HALF)
    attention = rows * heads * (config.head_dim + config.value_head_dim)
    if config.use_mla:
        rank, nope, value = config.kv_lora_rank or 0, config.qk_nope_head_dim, config.v_head_dim
        # Keys and values of all positions, and kv_b_proj in rows.
        expanded = heads * (-(-nope // _TILE) * _TILE + value)
        attention += rows * (rank + config.qk_rope_head_dim) + (positions + rank) * expanded
        if kv_cache == "int8":
            attention += positions * rank  # what the codes say
    else:
        attention += rows * 2 * config.num_key_value_heads * config.head_dim
    chosen, width = config.num_experts_per_tok or 0, config.moe_intermediate_size
    dense = config.intermediate_size if config.first_k_dense_replace or not chosen else 0
    experts = chosen * (hidden + width) + width * (config.n_shared_experts or 0)
    return common + _HALF * max(attention, rows * (hidden + max(dense, experts)))


def _repacking(config: LanguageConfig, kind: Kind, head_bytes: int) -> int:
    """The most that is alive while a weight changes its order: a few experts of a layer with all of it, or the head."""
    # The checkpoint's order, the tiles in pieces, and what a piece takes.
    head = 2 * head_bytes + _HEAD_REPACK_BYTES * HEAD_ROWS_AT_ONCE * config.hidden_size
    if kind != "int4":
        return head
    most = 0
    for layer in range(config.num_hidden_layers):
        for linear in linears(config, layer):
            weights = linear.outputs * linear.inputs
            at_once = min(_EXPERTS_AT_ONCE, linear.experts or 1)
            # A byte a weight: the layer as the checkpoint has it, and its finished tiles.
            most = max(most, _REPACK_BYTES * weights * at_once + weights * (linear.experts or 1))
    return max(head, most)
