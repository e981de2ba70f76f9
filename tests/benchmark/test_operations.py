"""Counted multiplications and bytes are those of the operations that ran."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_hyspark.benchmark.operations import counted_gb, forward_gmac
from nnunetv2_hyspark.benchmark.request import Request, make_encoder, make_step


def counted_bytes(run):
    return round(counted_gb(run) * 1e9)


def test_counts_a_convolution():
    conv, x = nn.Conv3d(2, 3, 3, padding=1), torch.randn(1, 2, 4, 4, 4)
    assert forward_gmac(lambda: conv(x)) == pytest.approx(64 * 27 * 2 * 3 / 1e9)
    assert counted_bytes(lambda: conv(x)) == 4 * (64 * 2 + 27 * 2 * 3 + 3 + 64 * 3)


def test_every_operation_counts_its_inputs_and_outputs():
    a, b = torch.randn(10, 20), torch.randn(20, 5)
    assert counted_bytes(lambda: a @ b) == 4 * (200 + 100 + 50)
    assert counted_bytes(lambda: F.relu(a) + 1) == 4 * (200 + 200 + 200 + 200)
    assert counted_bytes(lambda: a.double()) == 200 * (4 + 8)
    assert counted_bytes(lambda: torch.cat([a, a])) == 4 * (2 * 200 + 400)


def test_views_and_reserved_memory_count_nothing():
    a = torch.randn(10, 20)
    for run in (lambda: a.reshape(200), lambda: a.t()[3:], lambda: a.expand(5, 10, 20), lambda: a.detach().contiguous(),
                lambda: torch.empty_like(a), lambda: a.new_empty(7), lambda: torch.ops.aten._unsafe_view(a, [200])):
        assert counted_bytes(run) == 0
    assert counted_bytes(lambda: a.t().contiguous()) == 2 * 800


def test_what_changes_in_place_is_read_and_written():
    a, b = torch.randn(100), torch.randn(100)
    assert counted_bytes(lambda: a.add_(b)) == 3 * 400
    assert counted_bytes(lambda: torch._foreach_add_([a, b], 1.0)) == 4 * 400
    assert counted_bytes(lambda: torch.add(a, b, out=torch.empty(100))) == 4 * 400  # the target counts as read too


def test_sees_the_backward_pass_and_the_optimizer():
    request = Request(size=(32, 32, 32), base_width=8)
    forward, both = (counted_gb(make_encoder(request, "blocks", backward)) for backward in (False, True))
    assert forward > 0 and 2 < both / forward < 6
    assert counted_gb(make_step(request, "blocks")) > both
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(2, 4)
    loss = (x @ weight.t()).sum()
    assert counted_bytes(loss.backward) >= 4 * (2 * 4 + 2 * 4 + 16)


def test_blocks_move_less_than_dense_maps():
    request = Request(size=(64, 64, 64), base_width=8)
    blocks, dense = (counted_gb(make_encoder(request, variant, False)) for variant in ("blocks", "dense"))
    assert blocks < dense / 2
