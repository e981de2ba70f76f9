"""The linear probe reads off what is linearly there, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_hyspark.training.probe import LabelledCrop, LinearProbe, _at_points, load_labelled_crops


class TwoScales(nn.Module):
    """Features: the image itself and a coarse copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [image * self.scale, F.avg_pool3d(image, 2).repeat(1, 3, 1, 1, 1)]


def crop(name: str, seed: int, informative: bool = True) -> LabelledCrop:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(12, 10, 8, generator=generator) > 0.7).long() * 2
    noise = 0.1 * torch.randn(labels.shape, generator=generator)
    return LabelledCrop(name, ((labels - 1.0) * informative + noise)[None, None].float(), labels)


def test_what_is_there_is_found_and_what_is_not_is_not() -> None:
    probe = LinearProbe([crop("a", 0), crop("b", 1)], torch.device("cpu"))
    assert probe.classes == [0, 2]
    assert probe.score(TwoScales()) > 0.99
    blind = LinearProbe([crop("a", 0, False), crop("b", 1, False)], torch.device("cpu"))
    assert blind.score(TwoScales()) < 0.6


def test_no_trace_and_the_same_again() -> None:
    encoder = TwoScales().train()
    before, state = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    probe = LinearProbe([crop("a", 0), crop("b", 1)], torch.device("cpu"))
    first = probe.score(encoder)
    assert probe.score(encoder) == first
    assert torch.equal(torch.get_rng_state(), state) and encoder.training
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())


def test_ignored_voxels_count_nowhere() -> None:
    a, b = crop("a", 0), crop("b", 1)
    wrong = b.labels.clone()
    wrong[:6] = -1
    image = b.image.clone()
    image[..., :6, :, :] *= -1
    probe = LinearProbe([a, LabelledCrop("b", image, wrong)], torch.device("cpu"))
    assert probe.score(TwoScales()) > 0.95


def test_points_are_interpolated_as_up_sampling_does() -> None:
    feature = torch.randn(1, 3, 4, 5, 2)
    labels = torch.zeros(16, 15, 8, dtype=torch.long)
    dense = F.interpolate(feature, labels.shape, mode="trilinear", align_corners=False)
    points = torch.stack([torch.randint(0, n, (50,)) for n in labels.shape], dim=1)
    expected = dense[0][:, points[:, 0], points[:, 1], points[:, 2]].T
    found = _at_points(feature, points, LabelledCrop("a", torch.empty(0), labels))
    assert torch.allclose(found, expected, atol=1e-5)


def test_crops_of_a_preprocessed_data_set(small_dataset) -> None:
    crops = load_labelled_crops(997, "nnUNetPlans_3d_fullres", (16, 16, 24), 1, 4)
    assert len(crops) == 4 and crops[0].image.shape == (1, 1, 16, 16, 24)
    assert crops[0].labels.shape == (16, 16, 24)
    assert set(crops[0].labels.unique().tolist()) == {-1, 0, 1}, "outside the image nothing is labelled"
    with pytest.raises(ValueError, match="takes 2"):
        load_labelled_crops(997, "nnUNetPlans_3d_fullres", (16, 16, 16), 2, 4)
    with pytest.raises(ValueError, match="same\\s+plans name"):
        load_labelled_crops(997, "otherPlans_3d_fullres", (16, 16, 16), 1, 4)
