"""The response of constant maps, and its gradient, against whole convolutions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from nnunetv2_hyspark.sparse.border import border_response, correct_border, inside_of, response_gradient

sizes = st.tuples(*[st.integers(1, 8)] * 3)
kernels = st.tuples(*[st.sampled_from([1, 3, 5])] * 3)


@given(sizes, kernels, st.integers(1, 2))
def test_equals_the_convolution_of_a_constant_map(size, kernel, batch):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, dtype=torch.float64, generator=generator)
    weight = torch.randn(2, 3, *kernel, dtype=torch.float64, generator=generator)
    full = values.view(1, 3, 1, 1, 1).expand(batch, 3, *size)
    expected = F.conv3d(full, weight, padding=[k // 2 for k in kernel])
    response = border_response(values, weight, size)
    assert response.shape == (2, *map(min, size, kernel))
    canvas = inside_of(response).view(1, -1, 1, 1, 1).expand(expected.shape).clone()
    correct_border(canvas, response)
    torch.testing.assert_close(canvas, expected)


@given(sizes, kernels, st.integers(1, 2))
def test_the_gradient_is_the_adjoint(size, kernel, batch):
    """Summed up as if the response had been laid out voxel by voxel."""
    generator = torch.Generator().manual_seed(1)
    entries = tuple(map(min, size, kernel))
    response = torch.randn(2, *entries, dtype=torch.float64, generator=generator)
    grad = torch.randn(batch, 2, *size, dtype=torch.float64, generator=generator)
    canvas = inside_of(response).view(1, -1, 1, 1, 1).expand(grad.shape).clone()
    correct_border(canvas, response)
    ours = response_gradient(grad, grad.sum((0, 2, 3, 4)), entries)
    torch.testing.assert_close((canvas * grad).sum(), (response * ours).sum())
    assert ours.shape == response.shape
