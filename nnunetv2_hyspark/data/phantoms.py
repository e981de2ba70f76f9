"""Synthetic CT phantoms: random torsos for demos and tests. No patient's data is in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunetv2_hyspark.data.volumes import write_nifti

LABELS = {"background": 0, "kidneys": 1, "spine": 2, "liver": 3}
AIR_HU = -1000.0
FAT_HU = -100.0

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]


def make_phantom(
    seed: int, shape: Shape = (48, 48, 64), spacing_mm: Spacing = (3.0, 3.0, 3.0)
) -> tuple[np.ndarray, np.ndarray]:
    """Make one synthetic torso CT with labels.

    The body fills most of the field of view and is placed, tilted, sized and bent at random, and its organs with it:
    lungs above a domed diaphragm, heart, liver on the right, spleen on the left, kidneys beside the spine, aorta in
    front of it, bowel, ribs, fat rim, and often a table. Contrast agent brightens vessels, kidneys, liver and spleen by
    a random amount, and spleen, bowel and muscle share their values with the labelled organs, so that the place of an
    organ tells more than its brightness.

    Args:
        seed: the same seed gives the same phantom, of every shape and spacing the same anatomy at another sampling.
        shape: voxels along (foot-head, front-back, right-left), each at least 8.
        spacing_mm: voxel size along the same axes; noise is finer-grained than anatomy, which scales with the field of
            view.

    Returns:
        image: int16, ``shape``, Hounsfield units.
        label: uint8, ``shape``: 0 background, 1 kidneys, 2 spine, 3 liver.

    Raises:
        ValueError: if a size is below 8 or a spacing is not positive.
    """
    if len(shape) != 3 or min(shape) < 8:
        raise ValueError(f"the shape is {tuple(shape)}; a phantom needs three sizes of at least 8 voxels")
    if len(spacing_mm) != 3 or min(spacing_mm) <= 0:
        raise ValueError(f"the spacing is {tuple(spacing_mm)} mm; three positive lengths are needed")
    rng = np.random.default_rng(seed)
    body = _Body(rng, shape, spacing_mm)
    return body.scan(rng, spacing_mm), body.label


class _Body:
    """A torso in body coordinates: u to the left, v to the back, w to the head; the skin is at radius 1."""

    def __init__(self, rng: np.random.Generator, shape: Shape, spacing_mm: Spacing) -> None:
        self.u, self.v, self.w = _body_coordinates(rng, shape, spacing_mm)
        self.radius = np.sqrt(np.abs(self.u) ** 2.3 + np.abs(self.v) ** 2.3)
        self.inside = self.radius < 1
        self.values = np.full(shape, AIR_HU, dtype=np.float32)
        self.label = np.zeros(shape, dtype=np.uint8)
        self._build(rng)

    def _build(self, rng: np.random.Generator) -> None:
        u, v, w = self.u, self.v, self.w
        uniform = rng.uniform
        contrast = uniform(0, 130)
        muscle = uniform(40, 65)
        wall = 1 - uniform(0.07, 0.17)
        cavity = wall - uniform(0.1, 0.15)
        diaphragm = uniform(0.05, 0.35)

        self._table(rng)
        self._fill(self.inside, FAT_HU)
        self._fill(self.radius < wall, muscle)
        in_cavity = self.radius < cavity
        # fat between the organs of the belly, soft tissue between those of the chest
        self._fill(in_cavity & (v < 0.35) & (w < diaphragm), FAT_HU + uniform(0, 30))
        self._ribs(rng, wall)
        self._bowel(rng, in_cavity & (v < 0.3) & (w < diaphragm - 0.15), contrast)

        dome = diaphragm - 0.45 * (u**2 + v**2)
        for side in (-1, 1):
            lung = _ellipsoid(
                u, v, w, (side * uniform(0.4, 0.47), uniform(-0.05, 0.1), diaphragm + 0.4), (0.36, 0.62, 0.95)
            )
            self._fill(lung & in_cavity & (w > dome + 0.12 * (side < 0)), uniform(-880, -780))
        heart = _ellipsoid(u, v, w, (uniform(0.05, 0.15), uniform(-0.3, -0.2), diaphragm + 0.2), (0.3, 0.3, 0.35))
        self._fill(heart, 45 + 0.8 * contrast)

        liver_hu = uniform(45, 65) + 0.35 * contrast
        height = uniform(0.36, 0.5)
        liver = _ellipsoid(
            u, v, w, (-0.34, uniform(-0.15, 0.0), dome - height + 0.1), (uniform(0.48, 0.6), 0.6, height)
        )
        left_lobe = u < uniform(0.0, 0.25) - 0.4 * v
        liver &= in_cavity & (w < dome + 0.12) & left_lobe
        self._fill(liver, liver_hu)
        self._vessel_tree(rng, liver, liver_hu + uniform(0.1, 0.5) * contrast - 10)
        spleen = _ellipsoid(u, v, w, (0.55, uniform(0.15, 0.3), dome - 0.22), (0.17, 0.3, uniform(0.2, 0.32)))
        self._fill(spleen & in_cavity, liver_hu + uniform(-12, 20))

        kidneys = np.zeros_like(self.inside)
        kidney_hu = uniform(30, 45) + contrast * uniform(0.7, 1.1)
        for side in (-1, 1):
            center = (side * uniform(0.36, 0.44), uniform(0.3, 0.42), uniform(-0.45, -0.3) + 0.08 * (side > 0))
            size = np.array([uniform(0.12, 0.16), uniform(0.15, 0.2), uniform(0.22, 0.32)])
            tilt = side * uniform(0.1, 0.35)
            leaning = u - tilt * (w - center[2])
            kidney = _ellipsoid(leaning, v, w, center, tuple(size))
            kidneys |= kidney
            self._fill(_ellipsoid(leaning, v, w, center, tuple(1.35 * size)) & in_cavity, FAT_HU)
            self._fill(kidney, kidney_hu)
            sinus = (center[0] - side * 0.09, center[1] - 0.03, center[2])
            self._fill(kidney & _ellipsoid(leaning, v, w, sinus, tuple(0.5 * size)), FAT_HU + 40)

        bend = 0.05 * np.sin(2 * w + uniform(0, 6))
        aorta = (u - 0.1 - bend) ** 2 + (v - 0.22) ** 2 < uniform(0.06, 0.085) ** 2
        self._fill(aorta, 40 + contrast)
        cava = (u + 0.12 - bend) ** 2 + (v - 0.2) ** 2 < uniform(0.06, 0.085) ** 2
        self._fill(cava & (w < diaphragm), 40 + 0.6 * contrast)
        spine = self._spine(rng, bend)

        self.label[liver & (self.values > FAT_HU)] = LABELS["liver"]
        self.label[kidneys] = LABELS["kidneys"]
        self.label[spine] = LABELS["spine"]

    def _fill(self, where: np.ndarray, value: float) -> None:
        self.values[where & self.inside] = value

    def _table(self, rng: np.random.Generator) -> None:
        if rng.random() < 0.7:
            depth = self.v - 1.12 + 0.12 * self.u**2
            self.values[(np.abs(depth) < 0.07) & (np.abs(self.u) < 1.1)] = rng.uniform(-300, 150)

    def _ribs(self, rng: np.random.Generator, wall: float) -> None:
        angle = np.arctan2(self.u, self.v)
        phase = self.w * rng.uniform(16, 20) + 2.0 * np.abs(angle) + rng.uniform(0, 6)
        ring = np.abs(self.radius - wall + 0.06) < 0.045
        self._fill(ring & (np.sin(phase) > 0.35) & (self.w > -0.15) & (np.abs(angle) < 2.7), rng.uniform(250, 500))

    def _bowel(self, rng: np.random.Generator, where: np.ndarray, contrast: float) -> None:
        for _ in range(rng.integers(18, 30)):
            center = rng.uniform((-0.65, -0.65, -1.1), (0.65, 0.2, 0.2))
            size = rng.uniform(0.1, 0.26, 3)
            loop = _ellipsoid(self.u, self.v, self.w, tuple(center), tuple(size)) & where
            # unenhanced wall, enhanced wall, or oral contrast as bright as a kidney
            self._fill(loop, rng.uniform(20, 60) + contrast * rng.choice([0.0, 0.4, 1.0]))
            if rng.random() < 0.3:
                self._fill(loop & (self.v < center[1] - 0.3 * size[1]), -900.0)

    def _vessel_tree(self, rng: np.random.Generator, where: np.ndarray, value: float) -> None:
        for _ in range(3):
            slope = rng.uniform(-0.8, 0.8, 2)
            start = rng.uniform((-0.3, -0.2), (0.3, 0.2))
            off = (self.v - start[0] - slope[0] * (self.u + 0.35)) ** 2
            off += (self.w - start[1] + 0.1 - slope[1] * (self.u + 0.35)) ** 2
            self._fill(where & (off < 0.04**2), value)

    def _spine(self, rng: np.random.Generator, bend: np.ndarray) -> np.ndarray:
        u, v, w = self.u - bend, self.v, self.w
        width, depth = rng.uniform(0.16, 0.2), rng.uniform(0.17, 0.21)
        front = rng.uniform(0.46, 0.52)
        phase = np.sin(w * rng.uniform(12, 15) + rng.uniform(0, 6))
        column = ((u / width) ** 2 + ((v - front) / depth) ** 2) < 1
        core = ((u / width) ** 2 + ((v - front) / depth) ** 2) < 0.6
        canal_center = front + depth + 0.06
        canal = (u / 0.085) ** 2 + ((v - canal_center) / 0.075) ** 2 < 1
        arch = ((u / 0.17) ** 2 + ((v - canal_center) / 0.14) ** 2 < 1) & (phase > -0.3)
        process = (np.abs(u) < 0.045) & (v > canal_center) & (v < canal_center + rng.uniform(0.18, 0.25)) & (phase > 0)
        transverse = (np.abs(v - canal_center + 0.06) < 0.05) & (np.abs(u) < rng.uniform(0.26, 0.34)) & (phase > 0.5)
        hard, spongy = rng.uniform(350, 550), rng.uniform(150, 260)
        self._fill(arch | process | transverse, hard)
        self._fill(column, hard)
        self._fill(core, spongy)
        self._fill(column & (phase < -0.75), rng.uniform(70, 110))
        self._fill(canal, rng.uniform(20, 40))
        return (column | arch | process | transverse) & ~canal & self.inside

    def scan(self, rng: np.random.Generator, spacing_mm: Spacing) -> np.ndarray:
        """Add tissue texture, blur to the scanner's resolution, add noise; returns int16 HU."""
        shape = self.values.shape
        grain = _smooth_noise(rng, shape, spacing_mm, 5.0) * rng.uniform(6, 12)
        coarse = _smooth_noise(rng, shape, spacing_mm, 14.0) * rng.uniform(5, 10)
        texture = np.where(self.values < -500, 2.5, 1.0) * (grain + coarse) * self.inside
        sigma = [rng.uniform(1.2, 2.0) / s for s in spacing_mm]
        image = ndimage.gaussian_filter(self.values + texture, sigma)
        noise = _smooth_noise(rng, shape, spacing_mm, 1.5) * rng.uniform(10, 22)
        image += noise * np.where(self.inside, 1.0, 0.4)
        return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def _body_coordinates(
    rng: np.random.Generator, shape: Shape, spacing_mm: Spacing
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Body coordinates (u, v, w) of every voxel: tilted, shifted, scaled and smoothly bent."""
    extent = np.array(shape) * np.array(spacing_mm)
    axes = [(np.arange(n) + 0.5) * s - e / 2 for n, s, e in zip(shape, spacing_mm, extent)]
    z, y, x = (a.astype(np.float32) for a in np.meshgrid(*axes, indexing="ij"))
    tilt = np.deg2rad(rng.uniform((-10, -6, -6), (10, 6, 6)))
    half_width = extent[2] / 2 * rng.uniform(0.76, 0.92)
    half_depth = extent[1] / 2 * rng.uniform(0.72, 0.88)
    half_height = extent[0] / 2 * rng.uniform(0.9, 1.15)
    x = x - extent[2] * rng.uniform(-0.04, 0.04)
    y = y - extent[1] * rng.uniform(-0.06, 0.02)
    z = z - extent[0] * rng.uniform(-0.1, 0.1)
    x, y = np.cos(tilt[0]) * x - np.sin(tilt[0]) * y, np.sin(tilt[0]) * x + np.cos(tilt[0]) * y
    x = x - np.tan(tilt[1]) * z
    y = y - np.tan(tilt[2]) * z
    u, v, w = x / half_width, y / half_depth, z / half_height
    bent = []
    for coordinate, others in ((u, (v, w)), (v, (u, w)), (w, (u, v))):
        shift = sum(
            rng.uniform(0.01, 0.035) * np.sin(rng.uniform(2, 4) * other + rng.uniform(0, 6)) for other in others
        )
        bent.append(coordinate + shift)
    return bent[0], bent[1], bent[2]


def _ellipsoid(u: np.ndarray, v: np.ndarray, w: np.ndarray, center: tuple, radii: tuple) -> np.ndarray:
    return sum(((c - m) / r) ** 2 for c, m, r in zip((u, v, w), center, radii)) < 1


def _smooth_noise(rng: np.random.Generator, shape: Shape, spacing_mm: Spacing, scale_mm: float) -> np.ndarray:
    """Noise of unit variance whose grain has about ``scale_mm``."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, [scale_mm / 2 / s for s in spacing_mm], truncate=3.0)
    return noise / max(float(noise.std()), 1e-6)


def write_phantom_dataset(
    raw_folder: Path,
    dataset_id: int,
    name: str,
    num_train: int,
    num_test: int = 0,
    labelled: bool = True,
    first_seed: int = 0,
    shape: Shape = (48, 48, 64),
    spacing_mm: Spacing = (3.0, 3.0, 3.0),
) -> Path:
    """Write synthetic phantoms to disk.

    Args:
        raw_folder: nnUNet_raw for a labelled data set, any folder otherwise.
        dataset_id: number of the labelled data set; unused otherwise.
        name: name of the data set, or of the bare folder.
        num_train: phantoms for imagesTr, or in the bare folder.
        num_test: phantoms for imagesTs (and labelsTs); the bare folder gets them too.
        labelled: True writes a complete nnU-Net raw data set, False a bare folder of images for `hyspark prepare`.
        first_seed: seed of the first phantom, counted up from there; keep ranges apart that must not share phantoms.
        shape: as in :func:`make_phantom`.
        spacing_mm: as in :func:`make_phantom`.

    Returns:
        The folder ``raw_folder/DatasetNNN_name`` or ``raw_folder/name``.

    Raises:
        OSError: if it cannot be written.
    """
    folder = Path(raw_folder) / (f"Dataset{dataset_id:03d}_{name}" if labelled else name)
    for number in range(num_train + num_test):
        seed = first_seed + number
        image, label = make_phantom(seed, shape, spacing_mm)
        part = "Tr" if number < num_train else "Ts"
        case = f"synthetic_{seed:05d}"
        if labelled:
            write_nifti(_to_sitk(image, spacing_mm), folder / f"images{part}" / f"{case}_0000.nii.gz")
            write_nifti(_to_sitk(label, spacing_mm), folder / f"labels{part}" / f"{case}.nii.gz")
        else:
            write_nifti(_to_sitk(image, spacing_mm), folder / f"{case}.nii.gz")
    if labelled:
        content = {
            "name": name,
            "description": "Synthetic CT phantoms (generated by nnunetv2_hyspark, no patient data)",
            "channel_names": {"0": "CT"},
            "labels": LABELS,
            "numTraining": num_train,
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def _to_sitk(values: np.ndarray, spacing_mm: Spacing) -> sitk.Image:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing([float(s) for s in spacing_mm[::-1]])
    return image
