"""The transformer at the bottom of the hybrid encoder: a standard pre-norm ViT on the tokens it is given."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import nn

from ..geometry import Size3
from ..linear import use_linear


def sincos_position_embedding(
    cell: torch.Tensor, grid: Size3, width: int, temperature: float = 10000.0
) -> torch.Tensor:
    """Fixed 3D sine-cosine positions, one third of the width per axis, sines before cosines.

    Args:
        cell: int64 ``(...)``, flat row-major index of cells in the grid.
        grid: cells per axis ``(g0, g1, g2)``.
        width: embedding width, divisible by 6.
        temperature: base of the geometric progression of wavelengths.

    Returns:
        float32 ``(..., width)``.

    Raises:
        ValueError: if the width is not divisible by 6.
    """
    if width % 6:
        raise ValueError(f"the junction is {width} channels wide; 3D sine-cosine positions need a multiple of 6.")
    per_axis = width // 6
    exact = torch.float32 if cell.device.type == "mps" else torch.float64  # Apple's GPUs have no more
    omega = temperature ** -(torch.arange(per_axis, device=cell.device, dtype=exact) / per_axis)
    coordinates = (
        torch.div(cell, grid[1] * grid[2], rounding_mode="floor"),
        torch.div(cell, grid[2], rounding_mode="floor") % grid[1],
        cell % grid[2],
    )
    parts = []
    for coordinate in coordinates:
        angle = coordinate[..., None].to(exact) * omega
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=-1).float()


class TokenLayerNorm(nn.LayerNorm):
    """LayerNorm with the official release's eps of 1e-5."""

    def __init__(self, width: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__(width, eps=1e-5, device=device, dtype=dtype)


class ViT(nn.Module):
    """Pre-norm transformer blocks with query-key-value bias and a final LayerNorm.

    Args:
        width: token width, divisible by 6 and by ``heads``.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over ``width``.
    """

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        if width % 6 or width % heads:
            raise ValueError(
                f"the junction is {width} channels wide with {heads} heads; "
                f"the width must be divisible by 6 (positions) and by the number of heads."
            )
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=TokenLayerNorm) for _ in range(depth)
        )
        use_linear(self.blocks)
        self.norm = TokenLayerNorm(width)

    def forward(
        self, tokens: torch.Tensor, cell: torch.Tensor, grid: Size3, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encodes tokens.

        Args:
            tokens: ``(B, N, width)``.
            cell: int64 ``(B, N)`` or ``(1, N)``, where each token lies in the grid.
            grid: cells per axis.
            padding: boolean ``(B, N)``, True at slots that hold no token; nothing attends to them.

        Returns:
            ``(B, N, width)``.
        """
        tokens = tokens + sincos_position_embedding(cell, grid, tokens.shape[-1]).to(tokens.dtype)
        bias = None
        if padding is not None:  # added to the scores: timm adds a mask as it is where fused attention is off
            bias = torch.zeros_like(padding, dtype=tokens.dtype).masked_fill(padding, -torch.inf)[:, None, None, :]
        for block in self.blocks:
            tokens = block(tokens, attn_mask=bias)
        return self.norm(tokens)
