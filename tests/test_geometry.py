"""Integer geometry of strides, grids and patches."""
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_hyspark.geometry import as_size3, block_shapes, cumulative_strides, divide, multiply, volume

sizes = st.tuples(*[st.integers(1, 64)] * 3)


@pytest.mark.parametrize("value", [4, (4, 4, 4), [4, 4, 4], iter([4, 4, 4])])
def test_as_size3(value):
    assert as_size3(value) == (4, 4, 4)


@pytest.mark.parametrize("value", [0, -1, (1, 2), (1, 2, 3, 4), (1, 0, 3), ()])
def test_as_size3_rejects(value):
    with pytest.raises(ValueError, match="patch is .*expected three positive whole numbers"):
        as_size3(value, "patch")


@given(sizes, sizes)
def test_divide_undoes_multiply(a, b):
    assert divide(multiply(a, b), b) == a
    assert volume(multiply(a, b)) == volume(a) * volume(b) == math.prod(a) * math.prod(b)


@pytest.mark.parametrize("size", [(5, 4, 4), (4, 5, 4), (4, 4, 5)])
def test_divide_rejects_a_rest(size):
    with pytest.raises(ValueError, match="image of size .* is not divisible by"):
        divide(size, (2, 2, 2), "image of size")


def test_cumulative_strides():
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    assert cumulative_strides(strides) == [(1, 1, 1), (1, 2, 2), (2, 4, 4)]


@pytest.mark.parametrize(
    "strides, expected",
    [
        ([(1, 1, 1)] + [(2, 2, 2)] * 4, [(16,) * 3, (8,) * 3, (4,) * 3, (2,) * 3, (1,) * 3]),
        ([(1, 1, 1), (1, 2, 2), (2, 2, 2)], [(2, 4, 4), (2, 2, 2), (1, 1, 1)]),
        ([(1, 1, 1)], [(1, 1, 1)]),
    ],
)
def test_block_shapes(strides, expected):
    assert block_shapes(strides) == expected
