"""HySparK: hybrid sparse masking (Tang et al., MICCAI 2024)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..geometry import Size3, as_size3, block_shapes, divide
from ..masking import random_visible
from ..networks.encoder import HybridEncoder
from ..networks.reconstruction import SKIPS, ReconstructionDecoder, TransferableDecoder
from ..sparse import BlockLayout, SparseLayout
from ..sparse.backends import BACKENDS, Convolution

TARGETS = ("cell", "intensity")
"""What reconstructions are compared with; see :func:`target_statistics`."""


@dataclass(frozen=True)
class HySparKConfig:
    """Hyperparameters of HySparK pre-training. Defaults are the paper's where it gives one, but for ``decoder``."""

    mask_ratio: float = field(
        default=0.75, metadata={"range": (0.0, 1.0), "open": True, "help": "fraction of junction cells that are hidden"}
    )
    mask_ratio_low: float = field(
        default=0.0,
        metadata={"range": (0.0, 1.0), "help": "lowest mask ratio in training: every crop has one of its own, uniform "
                  "from here to mask_ratio; 0: mask_ratio for all"},
    )
    hidden_neighbours: str = field(
        default="zero",
        metadata={"choices": ("zero", "nearest"), "help": "what stands for hidden voxels in the encoder's "
                  "convolutions: zero, as in the paper, or the nearest voxel of the visible cell, which keeps features "
                  "closer to those of a whole image"},
    )
    bottom_up: bool = field(
        default=True,
        metadata={"help": "mask the CNN's feature maps too; false: only the image and the transformer's tokens are "
                  "masked, and the CNN runs on all of an image with zeros in it (slow; for comparison)"},
    )
    backend: str = field(
        default="auto",
        metadata={"choices": BACKENDS, "help": "who computes the encoder's sparse convolutions: torch; gathered: "
                  "matrix products over pairs of visible voxels for small blocks, where nothing is autocast; triton: "
                  "depthwise ones on CUDA without copies of halos (not yet run on a GPU); auto: gathered on CPUs, else "
                  "torch; compared with torch at the start"},
    )
    target: str = field(
        default="cell",
        metadata={"choices": TARGETS, "help": "what reconstructions are compared with: cell: intensities in units of "
                  "each hidden cell's deviation around its mean, as in the paper; intensity: preprocessed intensities "
                  "as they are, so that a cell's brightness has to be inferred too and faint noise counts little (not "
                  "in the paper)"},
    )
    decoder: str = field(
        default="segmentation",
        metadata={"choices": ("segmentation", "reconstruction"), "help": "who reconstructs: segmentation: the "
                  "segmentation network's own decoder, which fine-tuning takes over (not in the paper); "
                  "reconstruction: the paper's, which is dropped afterwards and which alone has the settings "
                  "decoder_width, fuse_finest, skips and decoder_norm"},
    )
    decoder_width: int = field(
        default=0,
        metadata={"range": (0, 4096), "help": "channels of the reconstruction decoder at the junction, halved per "
                  "scale; 0: so that the finest scale has half of the first CNN stage's channels"},
    )
    fuse_finest: bool = field(
        default=True, metadata={"help": "fuse the finest scale too (equation 4); the official release does not"}
    )
    skips: str = field(
        default="concatenate",
        metadata={"choices": SKIPS, "help": "how the encoder's scales join the reconstruction decoder: concatenated "
                  "and fused by convolutions, added, or not at all but for the junction"},
    )
    decoder_norm: str = field(
        default="instance", metadata={"choices": ("instance", "batch"), "help": "norm of the reconstruction decoder"}
    )
    learning_rate: float = field(default=1e-4, metadata={"range": (0.0, 1.0), "open": True, "help": "AdamW, peak"})
    weight_decay: float = field(default=0.05, metadata={"range": (0.0, 1.0), "help": "AdamW, matrices only"})
    warmup_epochs: float = field(
        default=10.0,
        metadata={"range": (0.0, 1e6), "help": "linear warm-up, epochs; at most a tenth of the run is used"},
    )
    epochs: int = field(default=1000, metadata={"range": (1, 10**7), "help": "epochs of iterations_per_epoch steps"})
    iterations_per_epoch: int = field(default=250, metadata={"range": (1, 10**7), "help": "optimizer steps per epoch"})
    val_iterations_per_epoch: int = field(
        default=50, metadata={"range": (1, 10**7), "help": "validation batches per epoch"}
    )
    gradient_clip: float = field(default=5.0, metadata={"range": (0.0, 1e9), "open": True, "help": "largest norm"})
    flip_axes: tuple[int, ...] = field(
        default=(0, 1, 2), metadata={"choices": (0, 1, 2), "help": "axes that are flipped at random"}
    )
    foreground_fraction: float = field(
        default=0.67,
        metadata={"range": (0.0, 1.0), "help": "share of crops around a voxel of the foreground mask that `hyspark "
                  "prepare` made; the others lie anywhere, and so do all crops of other data sets"},
    )
    batch_size: int = field(default=0, metadata={"range": (0, 4096), "help": "crops per step; 0: the plan's"})
    accumulate: int = field(
        default=1,
        metadata={"range": (1, 4096), "help": "parts in which a process computes its share of a batch, to save memory"},
    )
    save_every: int = field(default=25, metadata={"range": (1, 10**6), "help": "epochs between checkpoint_latest"})
    save_minutes: float = field(
        default=30.0,
        metadata={"range": (0.0, 1e6), "help": "checkpoint_latest is written after so many minutes too, also inside an "
                  "epoch; 0: never"},
    )
    keep_every: int = field(
        default=0, metadata={"range": (0, 10**7), "help": "epochs between checkpoints that are kept for good; 0: none"}
    )
    max_bad_steps: int = field(
        default=10, metadata={"range": (1, 10**6), "help": "steps in a row without a finite loss that end a run"}
    )
    on_broken_case: str = field(
        default="stop",
        metadata={"choices": ("stop", "skip"), "help": "what to do about a preprocessed file that cannot be read"},
    )
    data_timeout: float = field(
        default=600.0, metadata={"range": (0.0, 1e6), "help": "longest wait for a batch, s; 0 waits for ever"}
    )
    preview_every: int = field(
        default=25, metadata={"range": (0, 10**7), "help": "epochs between pictures of reconstructions; 0: none"}
    )
    preview_cases: int = field(default=3, metadata={"range": (1, 100), "help": "cases in the pictures"})
    validation_cases: int = field(
        default=100,
        metadata={"range": (0, 10**7), "help": "at most so many held-out cases, evenly spread, are reconstructed at "
                  "the end of training; 0: all"},
    )
    probe_dataset: int = field(
        default=0,
        metadata={"range": (0, 10**6), "help": "number of a labelled data set, preprocessed with the same plans name, "
                  "for the linear probe; 0: no probe"},
    )
    probe_every: int = field(default=50, metadata={"range": (1, 10**7), "help": "epochs between linear probes"})
    probe_cases: int = field(
        default=4, metadata={"range": (1, 1000), "help": "cases that a probe is fitted on, and as many that test it"}
    )
    tensorboard: bool = field(default=False, metadata={"help": "write TensorBoard files into the results folder"})
    seed: int = field(default=0, metadata={"range": (0, 2**31 - 1), "help": "of initialisation, crops and masks"})

    @property
    def lowest_mask_ratio(self) -> float:
        """Of training; see ``mask_ratio_low``."""
        return self.mask_ratio_low or self.mask_ratio


def patchify(image: torch.Tensor, cell: Size3) -> torch.Tensor:
    """Cuts an image into junction cells.

    Args:
        image: ``(B, C, D, H, W)``.
        cell: voxels per cell and axis.

    Returns:
        ``(B, g0, g1, g2, C, v)`` with ``v`` voxels per cell.
    """
    batch_size, channels = image.shape[:2]
    (g0, g1, g2), (s0, s1, s2) = divide(as_size3(image.shape[2:]), cell, "image of size"), cell
    cells = image.reshape(batch_size, channels, g0, s0, g1, s1, g2, s2).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return cells.reshape(batch_size, g0, g1, g2, channels, s0 * s1 * s2)


def unpatchify(cells: torch.Tensor, cell: Size3) -> torch.Tensor:
    """Inverse of :func:`patchify`."""
    batch_size, g0, g1, g2, channels, _ = cells.shape
    (s0, s1, s2) = cell
    image = cells.reshape(batch_size, g0, g1, g2, channels, s0, s1, s2).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return image.reshape(batch_size, channels, g0 * s0, g1 * s1, g2 * s2)


def cell_statistics(cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, ``sqrt(unbiased variance + 1e-6)``, over the voxels of each cell and channel."""
    mean = cells.mean(-1, keepdim=True)
    return mean, (cells.var(-1, keepdim=True, unbiased=True) + 1e-6).sqrt()


def target_statistics(cells: torch.Tensor, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a reconstruction's 0 and 1 stand for in preprocessed intensities, per cell and channel.

    Args:
        cells: ``(..., C, v)``, see :func:`patchify`.
        target: ``"cell"``: mean and deviation of each cell, see :func:`cell_statistics`; ``"intensity"``: 0 and 1.

    Returns:
        Mean and deviation, ``(..., C, 1)``.

    Raises:
        ValueError: for another target.
    """
    if target == "cell":
        return cell_statistics(cells)
    if target == "intensity":
        zero = torch.zeros_like(cells[..., :1])
        return zero, torch.ones_like(zero)
    raise ValueError(f"the target is {target!r}; expected one of {', '.join(TARGETS)}.")


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Promotes integers and half precision to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reconstruction_loss(
    image: torch.Tensor, reconstruction: torch.Tensor, visible: torch.Tensor, target: str = "cell"
) -> torch.Tensor:
    """Mean squared error on masked cells, against targets normalised per cell and channel in the paper (section 2.3).

    Args:
        image: ``(B, C, D, H, W)``.
        reconstruction: same shape.
        visible: boolean ``(B, g0, g1, g2)``.
        target: what is compared with; see :func:`target_statistics`.

    Returns:
        Scalar, float32 or better: the error averaged over the voxels and channels of a cell, then over all masked
        cells.
    """
    cell = divide(as_size3(image.shape[2:]), as_size3(visible.shape[1:]), "image of size")
    truth = patchify(_at_least_float32(image), cell)
    mean, std = target_statistics(truth, target)
    prediction = patchify(_at_least_float32(reconstruction), cell)
    # all cells, since a GPU has to be waited for where hidden ones are picked out
    difference = (prediction - (truth - mean) / std).masked_fill(visible[..., None, None], 0)
    return difference.square().mean((-2, -1)).sum() / (~visible).sum()


def denormalise(
    image: torch.Tensor, reconstruction: torch.Tensor, visible: torch.Tensor, target: str = "cell"
) -> torch.Tensor:
    """Brings a prediction to the image's intensities, and keeps visible cells.

    For looking at: where the target is ``"cell"``, the statistics are the hidden cells' true ones.

    Args:
        image: ``(B, C, D, H, W)``.
        reconstruction: same shape.
        visible: boolean ``(B, g0, g1, g2)``.
        target: what the prediction was trained for; see :func:`target_statistics`.

    Returns:
        ``(B, C, D, H, W)``, float32 or better.
    """
    cell = divide(as_size3(image.shape[2:]), as_size3(visible.shape[1:]), "image of size")
    truth = patchify(_at_least_float32(image), cell)
    mean, std = target_statistics(truth, target)
    filled = patchify(_at_least_float32(reconstruction), cell) * std + mean
    return unpatchify(torch.where(visible[..., None, None], truth, filled), cell)


class HySparK(nn.Module):
    """Masks junction cells, encodes the visible ones, reconstructs the image.

    Args:
        encoder: hybrid encoder; runs on visible blocks only.
        reconstruction: decoder with mask tokens.
        layout: how masked input is computed: :class:`BlockLayout`, or :class:`DenseMaskLayout` for reference; called
            with the mask and ``hidden_neighbours``.
        hidden_neighbours: what convolutions take for hidden voxels, ``"zero"`` or ``"nearest"``.
        bottom_up: whether the CNN computes visible cells alone; else it runs on the whole image with zeros in hidden
            cells, and what it made of those is dropped (the paper's table 5, "w/o bottom-up masking").
        target: what reconstructions are compared with; see :func:`target_statistics`.

    Attributes:
        hyspark_load_pretrained: who loads ``-pretrained_weights`` in place of nnU-Net, given the file's name; a trainer
            of ours sets it, the start-up hook calls it.
    """

    hyspark_load_pretrained: Callable[[str], None] | None = None

    def __init__(
        self,
        encoder: HybridEncoder,
        reconstruction: ReconstructionDecoder | TransferableDecoder,
        layout: Callable[[torch.Tensor, str], SparseLayout] = BlockLayout,
        hidden_neighbours: str = "zero",
        bottom_up: bool = True,
        target: str = "cell",
    ):
        super().__init__()
        self.encoder = encoder
        self.reconstruction = reconstruction
        self.layout = layout
        self.hidden_neighbours = hidden_neighbours
        self.bottom_up = bottom_up
        self.target = target
        self.kernels = list(zip(block_shapes(encoder.strides), encoder.cnn.kernel_sizes))

    def draw_mask(
        self, batch_size: int, image_size: Sequence[int], mask_ratio: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Random visible cells ``(B, g0, g1, g2)`` for images of this size; see :func:`random_visible`."""
        return random_visible(batch_size, self.encoder.grid(image_size), mask_ratio, generator)

    def compute_with(self, convolve: Convolution) -> None:
        """Leaves sparse convolutions to a backend; see :func:`nnunetv2_hyspark.sparse.backends.choose_backend`."""
        self.layout = functools.partial(BlockLayout, convolve=convolve)

    @torch.compiler.disable
    def lay_out(self, visible: torch.Tensor) -> SparseLayout:
        """The layout of a mask ``(B, g0, g1, g2)``, with whatever depends on the mask alone made."""
        layout = self.layout(visible, self.hidden_neighbours)
        layout.prepare(self.kernels, densified=isinstance(self.reconstruction, ReconstructionDecoder))
        if isinstance(layout, BlockLayout):
            for table in layout.of_varying_length():
                # or a compiler takes the first mask's lengths for constants and compiles twice
                torch._dynamo.maybe_mark_dynamic(table, 0)
        return layout

    def forward(self, image: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Reconstructs images from their visible cells.

        Args:
            image: ``(B, C, D, H, W)``; masked voxels do not influence the result.
            visible: boolean ``(B, g0, g1, g2)``, True at visible cells.

        Returns:
            ``(B, C, D, H, W)``, in units of the target: each cell's standard deviation around its mean, or
            preprocessed intensities.
        """
        layout = self.lay_out(visible)
        return self.reconstruction(self.encode(image, layout), layout)

    def encode(self, image: torch.Tensor, layout: SparseLayout) -> list[torch.Tensor]:
        """Features of an image's visible cells, finest first, in the layout's form."""
        sparse = layout.gather(image)
        if self.bottom_up:
            return self.encoder(sparse, layout)
        *skips, junction = (layout.gather(feature) for feature in self.encoder.cnn(layout.scatter(sparse)))
        return [*skips, self.encoder.transform(junction, layout)]
