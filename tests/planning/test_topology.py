"""Strides and cells: about cubic in mm, as deep as the images allow."""
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_hyspark.networks.topology import ArchitectureConfig, derive_arch_kwargs
from nnunetv2_hyspark.planning.patch import initial_patch, patch_candidates
from nnunetv2_hyspark.planning.topology import MIN_CELLS, plan_topology


def test_isotropic_images_get_the_papers_strides():
    topology = plan_topology((1.5, 1.5, 1.5), (160, 160, 160), 16)
    assert topology.strides == ((1, 1, 1), *[(2, 2, 2)] * 4)
    assert topology.kernel_sizes == ((3, 3, 3),) * 5


def test_prostate_slices_get_about_cubic_cells():
    topology = plan_topology((3.0, 0.6, 0.6), (20, 320, 256), 16)
    assert topology.total_stride == (4, 16, 16)
    assert topology.cell_mm((3.0, 0.6, 0.6)) == pytest.approx((12.0, 9.6, 9.6))
    assert topology.strides[1] == (1, 2, 2) and topology.kernel_sizes[0] == (1, 3, 3)


def test_small_images_get_fewer_stages():
    assert plan_topology((1, 1, 1), (36, 50, 35), 16).total_stride == (8, 8, 8)


def test_a_thin_axis_does_not_make_the_network_shallow():
    assert plan_topology((1, 1, 1), (12, 512, 512), 16).total_stride == (2, 16, 16)


def test_images_too_small_for_any_stage_are_refused():
    with pytest.raises(ValueError, match="at least 8 voxels along two axes"):
        plan_topology((1, 1, 1), (6, 6, 6), 16)


spacings = st.tuples(*[st.floats(0.3, 8.0)] * 3)


@given(spacings, st.sampled_from((4, 8, 16, 32)))
def test_cells_of_large_images_differ_by_less_than_two(spacing, max_stride):
    topology = plan_topology(spacing, (1024, 1024, 1024), max_stride)
    cells = topology.cell_mm(spacing)
    coarse = [s > max_stride * min(spacing) for s in spacing]  # a voxel that is larger than a cell stays one
    usual = [c for c, is_coarse in zip(cells, coarse) if not is_coarse]
    assert max(usual) / min(usual) <= 2.0001
    assert max(topology.total_stride) == 2 ** int(math.log2(max_stride))


@given(spacings, st.tuples(*[st.integers(16, 600)] * 3))
def test_every_plan_makes_a_network_and_patches_of_whole_cells(spacing, shape):
    first = initial_patch(spacing, shape)
    try:
        topology = plan_topology(spacing, first, 16)
    except ValueError:
        assert sorted(first)[1] < 2 * MIN_CELLS
        return
    kwargs = derive_arch_kwargs(topology.strides, topology.kernel_sizes, ArchitectureConfig())
    assert kwargs["n_stages"] == len(topology.strides) >= 2
    candidates = patch_candidates(first, topology.total_stride, shape)
    volumes = [math.prod(c) for c in candidates]
    assert volumes == sorted(volumes, reverse=True)
    for patch in candidates:
        assert all(p % s == 0 for p, s in zip(patch, topology.total_stride))
        assert all(p < f + s for p, f, s in zip(patch, first, topology.total_stride))
