"""The reference: dense maps, masked around every operation that mixes voxels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional as F

from ..geometry import Size3, as_size3, divide, multiply
from ..masking import upsample_mask
from .layout import check_hidden, check_visible


def _windows(x: torch.Tensor, cell: Size3, reach: Size3) -> torch.Tensor:
    """Every cell with ``reach`` voxels around it, zero outside the volume: ``(B * cells, C, c + 2 * reach, ...)``."""
    padded = F.pad(x, [edge for edge in reversed(reach) for _ in (0, 1)])
    for axis in range(3):
        padded = padded.unfold(axis + 2, cell[axis] + 2 * reach[axis], cell[axis])
    return padded.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(0, 3)


class DenseMaskLayout:
    """Computes on whole dense maps ``(B, C, D, H, W)`` and multiplies by the mask, as SparK does.

    Same interface and same results as :class:`nnunetv2_hyspark.sparse.BlockLayout` at visible voxels, at the full
    dense cost. What masked voxels hold between operations is undefined; :meth:`scatter` cleans them.
    """

    def __init__(self, visible: torch.Tensor, hidden: str = "zero"):
        check_visible(visible)
        check_hidden(hidden)
        self.visible = visible
        self.hidden = hidden
        self.grid: Size3 = as_size3(visible.shape[1:])
        self._masks: dict[Size3, torch.Tensor] = {}

    def prepare(self, kernels: Iterable[tuple[Size3, Size3]], densified: bool = True) -> None:
        """Makes the masks of these scales, ``densified`` or not."""
        for block, _ in kernels:
            self.mask(multiply(self.grid, block))

    def mask(self, size: Size3) -> torch.Tensor:
        """Boolean mask ``(B, 1, *size)``, True at visible voxels."""
        if size not in self._masks:
            self._masks[size] = upsample_mask(self.visible, divide(size, self.grid, "map of size"))
        return self._masks[size]

    def _mask_of(self, x: torch.Tensor) -> torch.Tensor:
        return self.mask(as_size3(x.shape[2:]))

    def gather(self, dense: torch.Tensor) -> torch.Tensor:
        """Zeroes the masked voxels."""
        return dense * self._mask_of(dense)

    def scatter(self, sparse: torch.Tensor, fill: torch.Tensor | None = None) -> torch.Tensor:
        """Writes ``fill`` ``(C,)``, or zero, into the masked voxels."""
        mask = self._mask_of(sparse)
        if fill is None:
            return sparse * mask
        return torch.where(mask, sparse, fill.to(sparse.dtype)[None, :, None, None, None])

    def conv3d(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Size3, groups: int
    ) -> torch.Tensor:
        """Same-padded dense convolution of the masked input, masked again."""
        if self.hidden == "nearest":
            return self._conv3d_of_windows(x, weight, bias, stride, groups)
        padding = [k // 2 for k in weight.shape[2:]]
        out = F.conv3d(x * self._mask_of(x), weight, bias, stride=stride, padding=padding, groups=groups)
        return out * self._mask_of(out)

    def _conv3d_of_windows(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Size3, groups: int
    ) -> torch.Tensor:
        """Convolves every cell with its surroundings apart, because each has its own idea of its hidden neighbours."""
        reach = (weight.shape[2] // 2, weight.shape[3] // 2, weight.shape[4] // 2)
        cell = divide(as_size3(x.shape[2:]), self.grid, "map of size")
        mask = self._mask_of(x)
        clean = torch.where(mask, x, 0)
        within = _windows(torch.ones_like(mask, dtype=x.dtype), cell, reach)
        own = _windows(clean, cell, (0, 0, 0))
        own = F.pad(own, [edge for edge in reversed(reach) for _ in (0, 1)], mode="replicate")
        seen = torch.where(_windows(mask.to(x.dtype), cell, reach) > 0, _windows(clean, cell, reach), own * within)
        out = F.conv3d(seen, weight, bias, stride=stride, groups=groups)
        batch_size, channels = x.shape[0], out.shape[1]
        (g0, g1, g2), (s0, s1, s2) = self.grid, as_size3(out.shape[2:])
        out = out.reshape(batch_size, g0, g1, g2, channels, s0, s1, s2).permute(0, 4, 1, 5, 2, 6, 3, 7)
        out = out.reshape(batch_size, channels, g0 * s0, g1 * s1, g2 * s2)
        return out * self._mask_of(out)

    def densified_conv3d(
        self, x: torch.Tensor, fill: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Fills the masked voxels, then convolves everything."""
        return F.conv3d(self.scatter(x, fill), weight, bias, padding=[k // 2 for k in weight.shape[2:]])

    def instance_norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """Normalises by the visible voxels of each sample, one sample at a time."""
        mask = self._mask_of(x)
        normalised = []
        for sample, visible in zip(x, mask):
            values = sample[:, visible[0]]
            mean, variance = values.mean(1), values.var(1, unbiased=False)
            out = (sample - mean[:, None, None, None]) * (variance + eps).rsqrt()[:, None, None, None]
            normalised.append(out)
        out = torch.stack(normalised)
        if weight is not None:
            out = out * weight[None, :, None, None, None]
        if bias is not None:
            out = out + bias[None, :, None, None, None]
        return out

    def max_pool3d(self, x: torch.Tensor, stride: Size3) -> torch.Tensor:
        """Dense pooling; windows never straddle a cell's border, so visible windows see visible voxels only."""
        return F.max_pool3d(x, stride, stride)

    def to_tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Visible tokens sample by sample, padded to the longest; see :class:`SparseLayout`."""
        rows = x.flatten(2).transpose(1, 2)
        visible = self.visible.flatten(1)
        counts = visible.sum(1)
        longest = int(counts.max())
        order = visible.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        tokens = rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2]))
        padding = torch.arange(longest, device=x.device)[None] >= counts[:, None]
        return tokens, order, padding if bool(padding.any()) else None

    def from_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Writes tokens back to their cells; masked cells are zero."""
        batch_size, _, channels = tokens.shape
        visible = self.visible.flatten(1)
        rank = (torch.cumsum(visible, 1) - 1).clamp(min=0)
        rows = tokens.gather(1, rank[:, :, None].expand(-1, -1, channels)) * visible[:, :, None]
        return rows.transpose(1, 2).reshape(batch_size, channels, *self.grid)
