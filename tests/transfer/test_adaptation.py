"""Other channels and kernel sizes: responses that stay the same."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nnunetv2_hyspark.transfer.adaptation import adapt_channels, adapt_kernel


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(old=st.integers(1, 5), new=st.integers(1, 5))
def test_repeated_image_gives_the_same_response(old, new):
    weight, image = random(3, old, 3, 3, 3), random(1, 1, 5, 5, 5)
    adapted, how = adapt_channels(weight, new)
    assert adapted.shape == (3, new, 3, 3, 3)
    assert bool(how) == (old != new)
    before = F.conv3d(image.expand(-1, old, -1, -1, -1), weight)
    after = F.conv3d(image.expand(-1, new, -1, -1, -1), adapted)
    torch.testing.assert_close(after, before)


def test_chosen_channels():
    """Channel 1 twice and nothing for the last: the response to (x, x, anything) is the old one to (0, x)."""
    weight, image = random(3, 2, 3, 3, 3), random(1, 3, 5, 5, 5)
    adapted, how = adapt_channels(weight, 3, [1, 1, -1])
    assert how == "input channels taken from [1, 1, -1] of 2"
    image[:, 1] = image[:, 0]
    torch.testing.assert_close(F.conv3d(image, adapted), F.conv3d(image[:, :1], weight[:, 1:]))


def test_masks_of_an_earlier_stage_have_no_influence_at_first():
    """The response to an image and any masks is the old one to the image."""
    weight, image = random(3, 1, 3, 3, 3), random(1, 4, 5, 5, 5)
    adapted, how = adapt_channels(weight, 4, masks=3)
    assert how == "3 channel(s) of masks begin with zeros"
    torch.testing.assert_close(F.conv3d(image, adapted), F.conv3d(image[:, :1], weight))
    two, how = adapt_channels(weight, 3, masks=1)
    assert "repeated" in how and "1 channel(s) of masks" in how
    torch.testing.assert_close(two[:, :2], adapt_channels(weight, 2)[0])
    as_many, how = adapt_channels(random(3, 2, 3, 3, 3), 2, masks=1)
    assert not as_many[:, 1].any() and how, "a second image is no mask, though the numbers are equal"
    assert "taken from" in adapt_channels(weight, 2, [0, -1], masks=1)[1], "a choice counts"


def test_reordered_channels():
    weight, image = random(3, 2, 3, 3, 3), random(1, 2, 5, 5, 5)
    adapted, how = adapt_channels(weight, 2, [1, 0])
    assert how
    torch.testing.assert_close(F.conv3d(image.flip(1), adapted), F.conv3d(image, weight))
    assert adapt_channels(weight, 2, [0, 1]) == (weight, "")


@pytest.mark.parametrize("chosen", [[0], [0, 2], [0, -2], [-1, -1], [0, 0, 0]])
def test_impossible_choice(chosen):
    with pytest.raises(ValueError, match="expected one entry per image channel, from 0 to 1, or -1"):
        adapt_channels(random(3, 2, 3, 3, 3), 2, chosen)


@pytest.mark.parametrize("new", [(5, 3, 3), (5, 5, 5), (3, 7, 3)])
def test_larger_kernel_is_exact(new):
    weight, image = random(4, 2, 3, 3, 3), random(1, 2, 9, 9, 9)
    adapted, how = adapt_kernel(weight, new)
    assert adapted.shape[2:] == new and how.endswith("exact")
    padding = [k // 2 for k in new]
    torch.testing.assert_close(F.conv3d(image, adapted, padding=padding), F.conv3d(image, weight, padding=1))


@pytest.mark.parametrize("new", [(1, 3, 3), (1, 1, 1), (5, 1, 3)])
def test_smaller_kernel_keeps_the_centre(new):
    weight = random(4, 2, 3, 3, 3)
    adapted, how = adapt_kernel(weight, new)
    assert adapted.shape[2:] == new and how.endswith("approximate")
    centre = tuple(k // 2 for k in new)
    assert torch.equal(adapted[(..., *centre)], weight[..., 1, 1, 1])


def test_cropping_undoes_padding():
    weight = random(4, 2, 3, 3, 3)
    assert torch.equal(adapt_kernel(adapt_kernel(weight, (5, 7, 3))[0], (3, 3, 3))[0], weight)
    assert adapt_kernel(weight, (3, 3, 3)) == (weight, "")


def test_even_kernel():
    with pytest.raises(ValueError, match="must be odd"):
        adapt_kernel(random(4, 2, 2, 2, 2), (3, 3, 3))
