"""The SigLIP vision tower (Zhai et al., arXiv 2303.15343) and the projector to the language model's width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trtvlm.model.config import ProjectorConfig, VisionConfig


class PatchEmbed(nn.Module):
    """A strided convolution: pixels [V, 3, S, S] -> patches [V, grid * grid, width], row by row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [V, 3, S, S] -> [V, grid * grid, width]; pixels past the last whole patch are unused."""
        patches: Tensor = self.proj(pixels)
        return patches.flatten(2).transpose(1, 2)


class VisionAttention(nn.Module):
    """Full attention within one view."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [V, P, width] -> the same shape."""
        views, patches, width = x.shape
        q, k, v = self.qkv(x).view(views, patches, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(views, patches, width))
        return projected


class VisionMLP(nn.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [V, P, width] -> the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class VisionBlock(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = VisionAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = VisionMLP(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        """x [V, P, width] -> the same shape."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTower(nn.Module):
    """Pixels -> patch features. The official attention pool is in the checkpoints but never run, so it is not here."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, config.width))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [V, 3, S, S] in -1..1 -> features [V, grid * grid, width]."""
        x = self.patch_embed(pixels) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


class Projector(nn.Module):
    """Merges r x r neighbouring patches and maps them to the language model's width."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.ratio = config.downsample_ratio
        inner = config.n_embed * config.mlp_ratio
        layers: list[nn.Module] = [nn.Linear(config.input_dim * self.ratio**2, inner)]
        for index in range(1, config.depth):
            layers += [nn.GELU(), nn.Linear(inner, config.n_embed if index == config.depth - 1 else inner)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [V, grid * grid, width] -> [V, h * h, n_embed] with h = ceil(grid / r).

        An odd grid is padded with zeros at the bottom and right. The channels of merged patches are ordered as
        torch.nn.functional.unfold orders them: channel slowest, then row, then column within the r x r square.
        """
        views, patches, width = x.shape
        grid, r = int(patches**0.5), self.ratio
        x = x.view(views, grid, grid, width)
        pad = -grid % r
        if pad:
            x = F.pad(x, (0, 0, 0, pad, 0, pad))
        side = (grid + pad) // r
        x = x.view(views, side, r, side, r, width).permute(0, 1, 3, 5, 2, 4)
        out: Tensor = self.layers(x.reshape(views, side * side, width * r * r))
        return out
