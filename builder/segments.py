"""The dense stretches of the language model, each between two plugin operators, as modules that export one by one.

A segment opens by adding what came before to the residual stream, may run a dense MLP, and closes by preparing what
comes after: an attention operator, an experts operator, or the logits. Rows are tokens; there is no batch dimension.
Attention over the cache and the experts are never in a segment: the operators in `trtvlm.plugins` do those.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from trtvlm.model.attention import MultiHeadAttention, MultiHeadLatentAttention
from trtvlm.model.language import DecoderLayer
from trtvlm.model.moe import MoE
from trtvlm.model.norm import RMSNorm
from trtvlm.plugins.int4_moe.module import Int4MoE


class Norm(nn.Module):
    """The model's RMSNorm through PyTorch's own operator, which exports as one RMSNormalization node."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """X [rows, width] -> the same; normalised in float32 whatever the type."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Stream(nn.Module):
    """Opens the first segment: the embeddings are the residual stream."""

    inputs = ("hidden",)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden [rows, hidden] as it is."""
        return hidden


class AttentionOut(nn.Module):
    """Opens a segment after attention: output projection and residual addition."""

    inputs = ("residual", "attention")

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.o_proj = layer.self_attn.o_proj

    def forward(self, residual: Tensor, attention: Tensor) -> Tensor:
        """Residual [rows, hidden], attention [rows, heads * v_dim] -> [rows, hidden]."""
        out: Tensor = residual + self.o_proj(attention)
        return out


class ExpertsOut(nn.Module):
    """Opens a segment after the experts: residual addition."""

    inputs = ("residual", "experts")

    def forward(self, residual: Tensor, experts: Tensor) -> Tensor:
        """Residual [rows, hidden] + experts [rows, hidden]."""
        return residual + experts


class DenseMLP(nn.Module):
    """The second half of a layer without experts."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.norm = Norm(layer.post_attention_layernorm)
        self.mlp = layer.mlp

    def forward(self, x: Tensor) -> Tensor:
        """X [rows, hidden] -> the same."""
        out: Tensor = x + self.mlp(self.norm(x))
        return out


class LatentAttentionIn(nn.Module):
    """Closes a segment before multi-head latent attention: queries, the normalised latent, the key part of all heads.

    Nothing is rotated here: the operator knows the positions.
    """

    outputs = ("q", "latent", "k_pe")

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        attention = layer.self_attn
        assert isinstance(attention, MultiHeadLatentAttention)
        self.norm = Norm(layer.input_layernorm)
        self.low_rank = attention.q_lora_rank is not None
        if self.low_rank:
            self.q_a_proj, self.q_a_norm = attention.q_a_proj, Norm(attention.q_a_layernorm)
            self.q_proj = attention.q_b_proj
        else:
            self.q_proj = attention.q_proj
        self.kv_a_proj, self.kv_a_norm = attention.kv_a_proj_with_mqa, Norm(attention.kv_a_layernorm)
        self.sizes = (attention.rank, attention.rope)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X [rows, hidden] -> q [rows, heads * (nope + rope)], latent [rows, rank], k_pe [rows, rope]."""
        normed = self.norm(x)
        q = self.q_proj(self.q_a_norm(self.q_a_proj(normed)) if self.low_rank else normed)
        latent, k_pe = self.kv_a_proj(normed).split(self.sizes, dim=-1)
        return q, self.kv_a_norm(latent), k_pe


class HeadAttentionIn(nn.Module):
    """Closes a segment before plain multi-head attention: queries, keys and values, not rotated."""

    outputs = ("q", "k", "v")

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        attention = layer.self_attn
        assert isinstance(attention, MultiHeadAttention)
        self.norm = Norm(layer.input_layernorm)
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X [rows, hidden] -> q [rows, heads * head_dim], k and v [rows, kv_heads * head_dim]."""
        normed = self.norm(x)
        return self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)


class ExpertsIn(nn.Module):
    """Closes a segment before the experts: their input and the router's logits, which stay float32."""

    outputs = ("normed", "router_logits")
    router: Tensor

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.norm = Norm(layer.post_attention_layernorm)
        experts = layer.mlp
        assert isinstance(experts, (MoE, Int4MoE))
        router = experts.gate.weight if isinstance(experts, MoE) else experts.router
        # float32 whatever the model's type, as the official gate computes it.
        self.register_buffer("router", router.detach().float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X [rows, hidden] -> normed [rows, hidden], router logits float32 [rows, experts]."""
        normed = self.norm(x)
        return normed, F.linear(normed.float(), self.router)


class Head(nn.Module):
    """Closes the last segment: final norm and LM head."""

    outputs = ("logits",)

    def __init__(self, norm: RMSNorm, lm_head: nn.Module) -> None:
        super().__init__()
        self.norm = Norm(norm)
        self.lm_head = lm_head

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """X [rows, hidden] -> logits float32 [rows, vocab]."""
        return (self.lm_head(self.norm(x)).float(),)


class Embed(nn.Module):
    """The token embedding, a graph of its own: image rows of a prompt are put over its output."""

    inputs = ("tokens",)
    outputs = ("hidden",)

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = embedding

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [rows] -> [rows, hidden]."""
        out: Tensor = self.embed_tokens(tokens)
        return out


Opening = Stream | AttentionOut | ExpertsOut
Closing = LatentAttentionIn | HeadAttentionIn | ExpertsIn | Head


class Segment(nn.Module):
    """One exported graph: an opening, for a dense layer its MLP, and a closing."""

    def __init__(self, opening: Opening, closing: Closing, dense: DenseMLP | None = None) -> None:
        super().__init__()
        self.opening, self.dense, self.closing = opening, dense, closing
        self.inputs: tuple[str, ...] = opening.inputs
        self.passes_residual = self.passes(type(opening), type(closing))
        self.outputs: tuple[str, ...] = (("residual_out",) if self.passes_residual else ()) + closing.outputs

    @staticmethod
    def passes(opening: type[Opening], closing: type[Closing]) -> bool:
        """Whether the residual stream goes on: not if it ends here, or nothing was added to it (it is the input itself)."""
        return closing is not Head and opening is not Stream

    def forward(self, stream: Tensor, added: Tensor | None = None) -> tuple[Tensor, ...]:
        """The tensors named by `inputs`, one or two -> those named by `outputs`."""
        x: Tensor = self.opening(stream) if added is None else self.opening(stream, added)
        if self.dense is not None:
            x = self.dense(x)
        closed: tuple[Tensor, ...] = self.closing(x)
        return (x, *closed) if self.passes_residual else closed
