"""Single convolutions are those of the network, and every way that is timed computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from nnunetv2_hyspark.benchmark import convolutions
from nnunetv2_hyspark.benchmark.convolutions import cases, measure_convolutions
from nnunetv2_hyspark.benchmark.plan import PlannedNetwork
from nnunetv2_hyspark.benchmark.request import Request
from nnunetv2_hyspark.benchmark.timing import Timings
from nnunetv2_hyspark.networks.topology import ArchitectureConfig, derive_arch_kwargs
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
KERNELS = [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
ANISOTROPIC = Request(
    size=(8, 32, 32), batch=2, repeats=1,
    planned=PlannedNetwork(
        "plans.json", "3d_fullres", (8, 32, 32), 2, 1,
        derive_arch_kwargs(STRIDES, KERNELS, ArchitectureConfig(base_width=16)), HySparKConfig(),
    ),
)


def test_cases_are_the_networks_convolutions() -> None:
    found = cases(ANISOTROPIC)
    found, others = found[:6], found[6:]
    assert {c.kind for c in others} == {"full"} and {c.inputs for c in others} == {found[-1].inputs}
    assert [c.block for c in others] == [(1, 1, 1), (2, 2, 4), (2, 4, 4)], "around the size up to which gathered serves"
    assert [(c.stage, c.kind) for c in found] == [(s, k) for s in range(3) for k in ("depthwise", "full")]
    assert [c.block for c in found[::2]] == [(4, 8, 8), (4, 4, 4), (2, 2, 2)]
    assert [c.image for c in found[::2]] == [(8, 32, 32), (8, 16, 16), (4, 8, 8)]
    channels = [(c.inputs, c.outputs, c.groups) for c in found[:4]]
    assert channels == [(16, 16, 16), (16, 32, 1), (32, 32, 32), (32, 64, 1)]
    assert [c.kernel for c in found[:3]] == [(1, 3, 3), (1, 3, 3), (3, 3, 3)]


def test_every_way_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(runs: Mapping[str, Callable[[], object]], *_: object) -> Timings:
        results = {name: run() for name, run in runs.items()}
        for name, result in results.items():
            tensors = [result] if isinstance(result, torch.Tensor) else result
            wanted = [results["torch"]] if isinstance(results["torch"], torch.Tensor) else results["torch"]
            for ours, theirs in zip(tensors, wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
            compared.append(name)
        return Timings({name: [1.0] for name in runs})

    monkeypatch.setattr(convolutions, "interleave", compare)
    rows = measure_convolutions(ANISOTROPIC)
    assert {name: compared.count(name) for name in set(compared)} == {"torch": 24, "gathered": 12, "own gradients": 6}
    visible = 2 * 2 * 4 * 4 // 4
    assert [tuple(row["shape"]) for row in rows[:2]] == [(visible, 16, 4, 8, 8), (2, 16, 8, 32, 32)]
