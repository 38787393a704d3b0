"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) and plain multi-head attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trtvlm.model.cache import HeadCache, LatentCache, LayerCache
from trtvlm.model.config import LanguageConfig
from trtvlm.model.norm import RMSNorm
from trtvlm.model.rope import rotate_adjacent, rotate_half_split

Rope = tuple[Tensor, Tensor]


class MultiHeadAttention(nn.Module):
    """Plain attention over cached keys and values; rotates the whole head in half-split pairs."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """x [B, T, hidden], rope of its positions ([B, T, d/2] twice), mask as `causal_mask` -> [B, T, hidden]."""
        batch, length, _ = x.shape
        cos, sin = (part.unsqueeze(1) for part in rope)
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate_half_split(q, cos, sin), rotate_half_split(k, cos, sin)
        if cache is not None:
            assert isinstance(cache, HeadCache)
            end = start + length
            cache.k[:, :, start:end] = k
            cache.v[:, :, start:end] = v
            k, v = cache.k[:, :, :end], cache.v[:, :, :end]
        attended = _attend(q, k, v, mask, self.head_dim**-0.5)
        out: Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
        return out


class MultiHeadLatentAttention(nn.Module):
    """Attention whose cache is one normalised latent and one rotated key part a token, shared by all heads.

    Keys are [latent @ key half of kv_b_proj | k_pe], values latent @ value half. For prefill and training they are
    expanded; `absorbed` folds the two halves into the query and the output instead, so that decoding reads the latent
    only (same result up to rounding).
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = (self.nope + self.rope) ** -0.5
        hidden, q_out = config.hidden_size, self.heads * (self.nope + self.rope)
        self.q_lora_rank = config.q_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, q_out, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_out, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope, bias=False)
        # The official layer does not pass rms_norm_eps here: always 1e-6.
        self.kv_a_layernorm = RMSNorm(self.rank)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v_dim, hidden, bias=False)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, hidden] -> q_nope [B, heads, T, nope], q_pe [B, heads, T, rope], latent [B, T, rank], k_pe.

        q_pe and k_pe [B, T, rope] are rotated.
        """
        batch, length, _ = x.shape
        cos, sin = rope
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_pe = q.view(batch, length, self.heads, -1).transpose(1, 2).split((self.nope, self.rope), dim=-1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope), dim=-1)
        q_pe = rotate_adjacent(q_pe, cos.unsqueeze(1), sin.unsqueeze(1))
        return q_nope, q_pe, self.kv_a_layernorm(latent), rotate_adjacent(k_pe, cos, sin)

    def kv_b_halves(self) -> tuple[Tensor, Tensor]:
        """kv_b_proj as its key half [heads, nope, rank] and value half [heads, v_dim, rank]."""
        weight = self.kv_b_proj.weight.view(self.heads, self.nope + self.v_dim, self.rank)
        key, value = weight.split((self.nope, self.v_dim), dim=1)
        return key, value

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """x [B, T, hidden], rope of its positions ([B, T, rope/2] twice), mask as `causal_mask` -> [B, T, hidden]."""
        batch, length, _ = x.shape
        q_nope, q_pe, latent, k_pe = self.project(x, rope)
        if cache is not None:
            assert isinstance(cache, LatentCache)
            cache.write(start, latent, k_pe)
            latent, k_pe = cache.read(start + length)
        if length == 1:
            attended = self.absorbed(q_nope, q_pe, latent, k_pe, mask)
        else:
            attended = self.expanded(q_nope, q_pe, latent, k_pe, mask)
        out: Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
        return out

    def expanded(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over expanded keys and values -> [B, heads, T, v_dim]; latent [B, S, rank], k_pe [B, S, rope]."""
        batch, span, _ = latent.shape
        kv = self.kv_b_proj(latent).view(batch, span, self.heads, -1).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.v_dim), dim=-1)
        q = torch.cat((q_nope, q_pe), dim=-1)
        k = torch.cat((k_nope, k_pe.unsqueeze(1).expand(-1, self.heads, -1, -1)), dim=-1)
        # Fused attention wants one head width: pad the values with zeros and cut them off again.
        padding = q.shape[-1] - self.v_dim
        out = _attend(q, k, F.pad(v, (0, padding)) if padding > 0 else v, mask, self.scale)
        return out[..., : self.v_dim]

    def absorbed(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, mask: Tensor | None) -> Tensor:
        """The same attention without expanding anything: the latent is key and value of every head."""
        key, value = self.kv_b_halves()
        q_latent = torch.einsum("bhtn,hnr->bhtr", q_nope, key)
        scores = torch.einsum("bhtr,bsr->bhts", q_latent, latent) + torch.einsum("bhtp,bsp->bhts", q_pe, k_pe)
        scores = scores.float() * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        mixed = torch.einsum("bhts,bsr->bhtr", scores.softmax(-1).to(latent.dtype), latent)
        return torch.einsum("bhtr,hvr->bhtv", mixed, value)


def causal_mask(length: int, start: int, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which of start + length positions each of the last `length` may see: bool [1 or B, 1, length, start + length].

    None means plain causal attention over `length` positions from nothing, which fused kernels know. `attention_mask`
    [B, start + length] is 0 at left padding; a padded row sees itself, so that its softmax is not empty.
    """
    if start == 0 and attention_mask is None:
        return None
    span = start + length
    rows = torch.arange(start, span, device=device).unsqueeze(1)
    columns = torch.arange(span, device=device)
    mask = (columns <= rows).view(1, 1, length, span)
    if attention_mask is None:
        return mask
    visible = attention_mask[:, :span].bool().view(-1, 1, 1, span)
    return (mask & visible) | (columns == rows).view(1, 1, length, span)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scaled dot-product attention: q [B, H, T, d], k and v [B, H or kv_heads, S, d] -> [B, H, T, d]."""
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
