"""Our norms equal PyTorch's, stay in channels-last memory and are accurate there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunetv2_hyspark.networks import normalization
from nnunetv2_hyspark.networks.normalization import BatchNorm3d, InstanceNorm3d


def pair(kind: str, channels: int):
    ours, theirs = {
        "instance": (InstanceNorm3d(channels), nn.InstanceNorm3d(channels, affine=True)),
        "batch": (BatchNorm3d(channels), nn.BatchNorm3d(channels)),
    }[kind]
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("cached", [2**18, 9, 1])
@pytest.mark.parametrize("kind", ["instance", "batch"])
@pytest.mark.parametrize("memory_format", [torch.channels_last_3d, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(1, 4, 3, 5, 2), (3, 2, 4, 4, 4), (2, 1, 1, 2, 3)])
def test_equals_pytorch(kind, memory_format, shape, cached, monkeypatch):
    """In one part or in many, of equal size or not."""
    monkeypatch.setattr(normalization, "CACHED_VALUES", cached)
    torch.manual_seed(0)
    ours, theirs = pair(kind, shape[1])
    ours, theirs = ours.double(), theirs.double()
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 1).contiguous(memory_format=memory_format).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    results = []
    for norm in (ours, theirs):
        out = norm(x)
        results.append([out, *torch.autograd.grad(out, [x, norm.weight, norm.bias], upstream)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for (name, got), (_, want) in zip(ours.named_buffers(), theirs.named_buffers()):
        torch.testing.assert_close(got, want, msg=name)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_accurate_on_large_channels_last_maps(kind):
    """PyTorch's channels-last batch norm errs by 1e-3 here."""
    torch.manual_seed(0)
    ours, _ = pair(kind, 3)
    x = (torch.randn(1, 3, 96, 96, 96) + 0.5).contiguous(memory_format=torch.channels_last_3d)
    out = ours(x)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    values = x.double()
    mean, std = values.mean((0, 2, 3, 4)), (values.var((0, 2, 3, 4), unbiased=False) + 1e-5).sqrt()
    scale, shift = (p.double()[:, None, None, None] for p in (ours.weight, ours.bias))
    expected = (values - mean[:, None, None, None]) / std[:, None, None, None] * scale + shift
    assert (out - expected).abs().max() < 1e-5


def test_batched_equals_one_by_one():
    norm = InstanceNorm3d(2)
    x = torch.randn(3, 2, 4, 5, 6)
    torch.testing.assert_close(norm(x), torch.cat([norm(sample) for sample in x.split(1)]))


def test_half_precision_keeps_its_type_and_float_statistics():
    norm = InstanceNorm3d(2)
    x = (100 + torch.randn(1, 2, 8, 8, 8)).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(out.float(), norm(x.float()), atol=0.05, rtol=0.05)


def test_running_statistics_forget_a_map_that_overflowed():
    norm = BatchNorm3d(2)
    x = torch.randn(2, 2, 4, 4, 4)
    norm(x)
    before = norm.running_mean.clone(), norm.running_var.clone()
    x[0, 1, 0, 0, 0] = float("inf")
    norm(x)
    assert torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()
    assert norm.running_mean[1] == before[0][1] and norm.running_var[1] == before[1][1]
    assert norm.running_mean[0] != before[0][0]


@pytest.mark.parametrize("shape", [(1, 7, 3), (2, 1000, 5), (3, 1, 2)])
def test_the_ways_of_cpus_and_gpus_are_equal(shape):
    rows = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    at_once, in_parts = normalization._statistics_at_once(rows), normalization._statistics_in_parts(rows)
    for ours, theirs in zip(at_once, in_parts, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.shape == (shape[0], shape[2])
