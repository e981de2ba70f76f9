"""From nnU-Net plans to the hybrid network."""
import dataclasses
import json

import pytest

from nnunetv2_hyspark.networks.topology import (
    NETWORK_CLASS,
    PAPER_STRIDES,
    ArchitectureConfig,
    architecture_of,
    derive_arch_kwargs,
    round_up,
    stages_to_junction,
)

ISOTROPIC = [[1, 1, 1], *[[2, 2, 2]] * 5]
ANISOTROPIC = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]  # in plane 1, 2, 4, 8, 16, 32


def kernels(n: int) -> list[list[int]]:
    return [[3, 3, 3]] * n


def derive(strides, config=None, **settings) -> dict:
    return derive_arch_kwargs(strides, kernels(len(strides)), config or ArchitectureConfig(**settings))


def test_paper_defaults():
    kwargs = derive(PAPER_STRIDES)
    assert kwargs["n_stages"] == 5
    assert kwargs["features_per_stage"] == [32, 64, 128, 256, 384]
    assert kwargs["n_blocks_per_stage"] == [1, 1, 3, 3, 1]
    assert kwargs["expansion_per_stage"] == [2, 4, 4, 4, 2]
    assert kwargs["transformer_depth"] == 3
    assert kwargs["transformer_heads"] == 12
    assert kwargs["mlp_ratio"] == 4.0


@pytest.mark.parametrize(
    "strides, n_stages, features, blocks, expansion, heads",
    [
        (ISOTROPIC, 5, [32, 64, 128, 256, 384], [1, 1, 3, 3, 1], [2, 4, 4, 4, 2], 12),
        (ISOTROPIC[:4], 4, [32, 64, 128, 288], [1, 1, 3, 1], [2, 4, 4, 2], 9),
        (ISOTROPIC[:3], 3, [32, 64, 192], [1, 1, 1], [2, 4, 2], 6),
        (ISOTROPIC[:2], 2, [32, 96], [1, 1], [2, 2], 3),
        (ANISOTROPIC, 5, [32, 64, 128, 256, 384], [1, 1, 3, 3, 1], [2, 4, 4, 4, 2], 12),
        (
            [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 1, 1]], 6, [32, 64, 128, 256, 512, 384],
            [1, 1, 3, 3, 3, 1], [2, 4, 4, 4, 4, 2], 12,
        ),
    ],
)
def test_derived_from_the_plan(strides, n_stages, features, blocks, expansion, heads):
    kwargs = derive(strides)
    assert kwargs["n_stages"] == n_stages
    assert kwargs["features_per_stage"] == features
    assert kwargs["n_blocks_per_stage"] == blocks
    assert kwargs["expansion_per_stage"] == expansion
    assert kwargs["transformer_heads"] == heads
    assert kwargs["strides"] == strides[:n_stages]
    assert kwargs["kernel_sizes"] == kernels(n_stages)
    assert kwargs["n_blocks_per_stage_decoder"] == [1] * (n_stages - 1)


@pytest.mark.parametrize(
    "strides, max_stride, expected",
    [(ISOTROPIC, 16, 5), (ISOTROPIC, 8, 4), (ISOTROPIC, 64, 6), (ANISOTROPIC, 16, 5), (ANISOTROPIC, 32, 6)],
)
def test_stages_to_junction(strides, max_stride, expected):
    """An axis that reaches the limit stops them all."""
    assert stages_to_junction(strides, max_stride) == expected


@pytest.mark.parametrize("strides, kept", [([[1, 1, 1]], 1), ([[1, 1, 1], [1, 32, 32]], 1), ([[32, 32, 32]], 0)])
def test_plan_without_a_junction(strides, kept):
    with pytest.raises(ValueError, match=f"leave {kept} stage up to total stride 16.*larger patch or raise max_stride"):
        derive(strides)


@pytest.mark.parametrize(
    "settings, features, heads",
    [
        ({"base_width": 16}, [16, 32, 64, 128, 192], 6),
        ({"base_width": 8}, [8, 16, 32, 64, 96], 3),
        ({"base_width": 8, "head_width": 16}, [8, 16, 32, 64, 96], 6),
        ({"junction_width": 192}, [32, 64, 128, 256, 192], 6),
        ({"junction_width": 768, "head_width": 64}, [32, 64, 128, 256, 768], 12),
        ({"features_per_stage": (4, 8, 12, 24, 48), "head_width": 8}, [4, 8, 12, 24, 48], 6),
        ({"transformer_depth": 0, "junction_width": 100}, [32, 64, 128, 256, 100], 1),
    ],
)
def test_widths_and_heads(settings, features, heads):
    kwargs = derive(PAPER_STRIDES, **settings)
    assert kwargs["features_per_stage"] == features
    assert kwargs["transformer_heads"] == heads


@pytest.mark.parametrize("base_width", range(4, 65, 5))
@pytest.mark.parametrize("head_width", [8, 16, 32, 33, 48, 64])
def test_derived_junctions_always_suit_the_transformer(base_width, head_width):
    """Whatever the widths, the derived junction is divisible by 6 and by the head width."""
    for n in (2, 3, 4, 5):
        width = derive(ISOTROPIC[:n], base_width=base_width, head_width=head_width)["features_per_stage"][-1]
        assert width % 6 == 0 and width % head_width == 0


@pytest.mark.parametrize("name", ["features_per_stage", "n_blocks_per_stage", "expansion_per_stage"])
@pytest.mark.parametrize("values", [(6, 6, 6, 96), (6, 6, 6, 6, 6, 96)])
def test_lists_of_another_length_are_refused(name, values):
    with pytest.raises(ValueError, match=f"{name} has {len(values)} values .* has 5 stages up to total stride 16"):
        derive(PAPER_STRIDES, **{name: values})


@pytest.mark.parametrize("width", [100, 90, 32])
def test_junction_width_must_suit_the_transformer(width):
    """90 is a multiple of 6 but not of the head width; 32 the other way round. The proposal works."""
    with pytest.raises(ValueError, match=f"the junction is {width} channels wide.*for example ") as caught:
        derive(PAPER_STRIDES, junction_width=width)
    proposal = int(str(caught.value).rsplit("for example ", 1)[1].rstrip("."))
    assert derive(PAPER_STRIDES, junction_width=proposal)["features_per_stage"][-1] == proposal


def test_round_up():
    assert [round_up(v, 96) for v in (1, 96, 97, 256, 384)] == [96, 96, 192, 288, 384]


def test_plans_hold_plain_json():
    kwargs = derive(tuple(tuple(s) for s in ANISOTROPIC))
    assert json.loads(json.dumps(kwargs)) == kwargs


def test_every_field_says_what_it_is():
    for field in dataclasses.fields(ArchitectureConfig):
        assert field.metadata["help"]


def plan(network_class: str = "dynamic_network_architectures.architectures.unet.PlainConvUNet", **changes) -> dict:
    return {
        "patch_size": [96, 96, 96],
        "architecture": {
            "network_class_name": network_class,
            "arch_kwargs": {"n_stages": 6, "strides": ISOTROPIC, "kernel_sizes": kernels(6), "conv_bias": True},
            "_kw_requires_import": ["conv_op"],
        },
        **changes,
    }


def test_architecture_of_a_stock_plan():
    configuration = plan()
    before = json.dumps(configuration)
    architecture = architecture_of(configuration, ArchitectureConfig())
    assert architecture["network_class_name"] == NETWORK_CLASS
    assert architecture["arch_kwargs"] == derive(ISOTROPIC)
    assert architecture["_kw_requires_import"] == []
    assert json.dumps(configuration) == before


def test_architecture_of_our_own_plan_is_kept():
    configuration = plan(NETWORK_CLASS)
    assert architecture_of(configuration, ArchitectureConfig(base_width=8)) == configuration["architecture"]


def test_2d_plans_are_refused():
    with pytest.raises(ValueError, match=r"2D patch \[256, 256\]; HySparK networks are 3D.*3d_fullres"):
        architecture_of(plan(patch_size=[256, 256]), ArchitectureConfig())
