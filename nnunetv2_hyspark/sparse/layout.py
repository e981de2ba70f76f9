"""Where the visible blocks of a batch lie, and the operations of the encoder on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch.nn import functional as F

from ..geometry import Size3, as_size3, divide, multiply, volume
from .backends import Convolution
from .convolution import submanifold_conv3d
from .halo import HaloTable, halo_table
from .normalization import instance_norm
from .projection import Rims, half_kernel, project_densified, rims, sparse_projection_pays


class SparseLayout(Protocol):
    """What an encoder may do with a sparse feature map; the map's own form is the layout's business."""

    visible: torch.Tensor

    def prepare(self, kernels: Iterable[tuple[Size3, Size3]], densified: bool = True) -> None:
        """Makes whatever depends on the mask alone, for sparse maps with cells of these shapes and these kernels, and
        for :meth:`densified_conv3d` if that will be asked for."""

    def gather(self, dense: torch.Tensor) -> torch.Tensor:
        """Turns a dense map ``(B, C, D, H, W)`` into this layout's sparse map."""

    def scatter(self, sparse: torch.Tensor, fill: torch.Tensor | None = None) -> torch.Tensor:
        """Turns a sparse map into a dense one; masked voxels get ``fill`` ``(C,)``, or zero."""

    def conv3d(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Size3, groups: int
    ) -> torch.Tensor:
        """Same-padded convolution that neither reads nor writes masked voxels; the layout says what stands for them."""

    def densified_conv3d(
        self, x: torch.Tensor, fill: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Dense same-padded convolution of the densified map, ``conv3d(scatter(x, fill), weight, bias)``."""

    def instance_norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """Instance normalisation over visible voxels."""

    def max_pool3d(self, x: torch.Tensor, stride: Size3) -> torch.Tensor:
        """Max-pooling with window = stride."""

    def to_tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Turns a junction map into ``(tokens (B, N, C), cell (B, N), padding (B, N) or None)``.

        ``cell`` is the flat index of a token's cell in the grid; ``padding`` is True where a sample has fewer visible
        cells than the largest of its batch, None where all have the same number.
        """

    def from_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`to_tokens`."""


class BlockLayout:
    """Visible junction cells of a batch; sparse maps are blocks ``(n_visible, C, s0, s1, s2)``.

    Blocks are ordered by sample, then by cell in row-major order. Made once per step from the mask; index tables are
    made at first use and kept as long as the layout lives.

    Args:
        visible: boolean ``(B, g0, g1, g2)``.
        hidden: what convolutions take for masked voxels next to a visible block: ``"zero"``, or ``"nearest"``, the
            nearest voxel of that block.
        convolve: who computes convolutions; see :mod:`nnunetv2_hyspark.sparse.backends`.

    Raises:
        ValueError: if the mask has another shape or dtype, a sample has no visible cell, or ``hidden`` is unknown.
    """

    def __init__(
        self, visible: torch.Tensor, hidden: str = "zero", convolve: Convolution = submanifold_conv3d
    ):
        check_visible(visible)
        check_hidden(hidden)
        self.visible = visible
        self.hidden = hidden
        self.convolve = convolve
        self.batch_size = visible.shape[0]
        self.grid: Size3 = as_size3(visible.shape[1:])
        self.cells = visible.nonzero()
        self.sample = self.cells[:, 0]
        self.counts: list[int] = visible.flatten(1).sum(1).tolist()
        if min(self.counts) == 0:
            raise ValueError(
                f"sample {self.counts.index(0)} of the batch has no visible cell; every sample needs at least one, "
                f"so lower the mask ratio or enlarge the patch."
            )
        self._tables: dict[tuple[Size3, Size3], HaloTable] = {}
        self._rims: dict[Size3, Rims] = {}

    def halo(self, block: Size3, radius: Size3) -> HaloTable:
        """Gather table for blocks of this shape and this halo radius."""
        key = (block, radius)
        if key not in self._tables:
            self._tables[key] = halo_table(self.cells, self.batch_size, self.grid, block, radius, self.hidden)
        return self._tables[key]

    def rims(self, reach: Size3) -> Rims:
        """Where blocks grown by this reach lie."""
        if reach not in self._rims:
            self._rims[reach] = rims(self.cells, self.grid, reach)
        return self._rims[reach]

    def of_varying_length(self) -> Iterator[torch.Tensor]:
        """The tables made so far whose length depends on where the visible cells lie."""
        for table in self._tables.values():
            yield table.empty
        for placement in self._rims.values():
            for _, inside, places in placement.parts:
                yield inside
                yield places

    def prepare(self, kernels: Iterable[tuple[Size3, Size3]], densified: bool = True) -> None:
        """Makes the index tables for blocks of these shapes and kernels of these sizes, and those of
        :meth:`densified_conv3d` if it is ``densified``.

        Tables are also made when they are first asked for; but their sizes depend on the mask, which a compiled
        network cannot trace, so they are best made before it runs.
        """
        for block, kernel in kernels:
            reach = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
            if reach != (0, 0, 0):
                table = self.halo(block, reach)
                if self.convolve is not submanifold_conv3d:
                    table.neighbours  # noqa: B018, made here for the same reason
            if densified:
                self.rims(reach)
        if densified:
            self.rims((0, 0, 0))

    def gather(self, dense: torch.Tensor) -> torch.Tensor:
        """See :class:`SparseLayout`. The blocks are in channels-last memory."""
        batch_size, channels = dense.shape[:2]
        if batch_size != self.batch_size:
            raise ValueError(f"the map has {batch_size} samples, the mask {self.batch_size}; give one mask per sample.")
        (g0, g1, g2) = self.grid
        (s0, s1, s2) = divide(as_size3(dense.shape[2:]), self.grid, "map of size")
        cells = dense.reshape(batch_size, channels, g0, s0, g1, s1, g2, s2).permute(0, 2, 4, 6, 3, 5, 7, 1)
        b, i, j, k = self.cells.unbind(1)
        return cells[b, i, j, k].contiguous().permute(0, 4, 1, 2, 3)

    def scatter(self, sparse: torch.Tensor, fill: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`SparseLayout`. The dense map is in channels-last memory."""
        channels = sparse.shape[1]
        (g0, g1, g2), (s0, s1, s2) = self.grid, as_size3(sparse.shape[2:])
        shape = (self.batch_size, g0, g1, g2, s0, s1, s2, channels)
        if fill is None:
            canvas = sparse.new_zeros(shape)
        else:
            canvas = fill.to(sparse.dtype).view(1, 1, 1, 1, 1, 1, 1, channels).expand(shape)
        b, i, j, k = self.cells.unbind(1)
        cells = canvas.index_put((b, i, j, k), sparse.permute(0, 2, 3, 4, 1))
        rows = cells.permute(0, 1, 4, 2, 5, 3, 6, 7)
        dense = rows.reshape(self.batch_size, *multiply(self.grid, (s0, s1, s2)), channels)
        return dense.permute(0, 4, 1, 2, 3)

    def conv3d(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Size3, groups: int
    ) -> torch.Tensor:
        """See :func:`nnunetv2_hyspark.sparse.convolution.submanifold_conv3d`; computed by the layout's backend."""
        block = as_size3(x.shape[2:])
        divide(block, stride, "block")
        radius = (weight.shape[2] // 2, weight.shape[3] // 2, weight.shape[4] // 2)
        table = None if radius == (0, 0, 0) else self.halo(block, radius)
        return self.convolve(x, weight, bias, table, groups, stride)

    def densified_conv3d(
        self, x: torch.Tensor, fill: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See :class:`SparseLayout`; computes visible blocks only where that is cheaper."""
        share = len(self.cells) / (self.batch_size * volume(self.grid))
        kernel = as_size3(weight.shape[2:])
        if sparse_projection_pays(as_size3(x.shape[2:]), kernel, share):
            placement = self.rims(half_kernel(weight))
            return project_densified(x, fill, weight, bias, self.cells, placement, self.batch_size, self.grid)
        return F.conv3d(self.scatter(x, fill), weight, bias, padding=[k // 2 for k in kernel])

    def instance_norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """See :func:`nnunetv2_hyspark.sparse.normalization.instance_norm`."""
        return instance_norm(x, self.sample, self.batch_size, weight, bias, eps)

    def max_pool3d(self, x: torch.Tensor, stride: Size3) -> torch.Tensor:
        """Pools inside each block; the stride must divide the block's edges."""
        divide(as_size3(x.shape[2:]), stride, "block")
        return F.max_pool3d(x, stride, stride)

    def to_tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """See :class:`SparseLayout`; a block must be one voxel here."""
        if tuple(x.shape[2:]) != (1, 1, 1):
            raise ValueError(
                f"blocks are {tuple(x.shape[2:])} voxels; tokens need blocks of one voxel, at the junction."
            )
        channels = x.shape[1]
        rows = x.reshape(-1, channels)
        flat = (self.cells[:, 1] * self.grid[1] + self.cells[:, 2]) * self.grid[2] + self.cells[:, 3]
        longest = max(self.counts)
        if longest == min(self.counts):
            return rows.view(self.batch_size, longest, channels), flat.view(self.batch_size, longest), None
        slots = self._token_slots(longest)
        tokens = rows.new_zeros(self.batch_size * longest, channels).index_copy(0, slots, rows)
        cell = flat.new_zeros(self.batch_size * longest).index_copy(0, slots, flat)
        padding = torch.ones_like(cell, dtype=torch.bool).index_fill(0, slots, False)
        shape = (self.batch_size, longest)
        return tokens.view(*shape, channels), cell.view(shape), padding.view(shape)

    def from_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """See :class:`SparseLayout`."""
        longest, channels = tokens.shape[1:]
        rows = tokens.reshape(-1, channels)
        if longest != min(self.counts):
            rows = rows.index_select(0, self._token_slots(longest))
        return rows.view(-1, channels, 1, 1, 1)

    def _token_slots(self, longest: int) -> torch.Tensor:
        counts = torch.tensor(self.counts, device=self.sample.device)
        first = torch.cumsum(counts, 0) - counts
        position = torch.arange(len(self.sample), device=self.sample.device) - first[self.sample]
        return self.sample * longest + position


def check_hidden(hidden: str) -> None:
    """Raises ValueError unless ``hidden`` names what stands for masked voxels."""
    if hidden not in ("zero", "nearest"):
        raise ValueError(f"hidden is {hidden!r}; expected 'zero' or 'nearest'.")


def check_visible(visible: torch.Tensor) -> None:
    """Raises ValueError unless ``visible`` is a boolean ``(B, g0, g1, g2)`` tensor."""
    if visible.ndim != 4 or visible.dtype != torch.bool:
        raise ValueError(
            f"the mask is {visible.dtype} of shape {tuple(visible.shape)}; "
            f"expected torch.bool of shape (B, g0, g1, g2)."
        )
