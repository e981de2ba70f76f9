"""Sparse feature maps as dense tensors of visible blocks, and the few operations the encoder needs on them.

Two layouts share one interface: :class:`BlockLayout` computes visible blocks only; :class:`DenseMaskLayout` computes
everything and multiplies by the mask, as SparK and the official HySparK do, and is the reference.
"""

from .dense import DenseMaskLayout
from .layout import BlockLayout, SparseLayout

__all__ = ["BlockLayout", "DenseMaskLayout", "SparseLayout"]
