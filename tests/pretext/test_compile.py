"""torch.compile traces the whole network but for the layout, which depends on the mask's values."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from nnunetv2_hyspark.pretext.hyspark import reconstruction_loss


@pytest.mark.slow
def test_compiled_equals_eager_with_one_graph_break(make_model):
    torch._dynamo.reset()
    counters.clear()
    model = make_model("isotropic")
    compiled = torch.compile(model, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    size = [4 * s for s in model.encoder.junction_stride]
    image = torch.randn(2, 1, *size, dtype=next(model.parameters()).dtype)
    for _ in range(3):
        visible = model.draw_mask(2, size, 0.75, generator)
        losses = [reconstruction_loss(image, network(image, visible), visible) for network in (model, compiled)]
        gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
        torch.testing.assert_close(losses[1], losses[0])
        for got, want in zip(*gradients):
            torch.testing.assert_close(got, want)
    reasons = dict(counters["graph_break"])
    assert len(reasons) <= 1 and all("disable" in reason for reason in reasons), reasons
