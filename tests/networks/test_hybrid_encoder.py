"""One encoder, dense or sparse."""
import pytest
import torch

from nnunetv2_hyspark.geometry import cumulative_strides, multiply
from nnunetv2_hyspark.masking import upsample_mask
from nnunetv2_hyspark.networks.convolution import Conv3d
from nnunetv2_hyspark.networks.mednext import ChannelLayerNorm, MedNeXtBlock
from nnunetv2_hyspark.networks.vit import ViT
from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout

GRIDS = [(2, 2, 2), (1, 2, 3), (3, 1, 2)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_visible(batch_size: int, grid: tuple) -> torch.Tensor:
    """Bernoulli masks with unequal counts, at least one visible cell each."""
    visible = torch.rand(batch_size, *grid, generator=torch.Generator().manual_seed(4)) < 0.5
    visible[:, 0, 0, 0] = True
    return visible


def image_for(encoder, batch_size: int, grid: tuple, channels: int = 1) -> torch.Tensor:
    return noise(batch_size, channels, *multiply(grid, encoder.junction_stride))


@pytest.mark.parametrize("layout", [BlockLayout, DenseMaskLayout])
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_dense_equals_sparse_when_all_is_visible(small_encoder, topology, grid, channels, depth, layout):
    encoder = small_encoder(topology, channels, depth)
    image = image_for(encoder, 2, grid, channels)
    where = layout(torch.ones(2, *grid, dtype=torch.bool))
    for dense, sparse in zip(encoder(image), encoder(where.gather(image), where)):
        torch.testing.assert_close(where.scatter(sparse), dense, rtol=0, atol=1e-11)


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_blocks_equal_the_masked_reference(small_encoder, topology, grid, depth):
    """Features at visible voxels, and gradients of the image and of every parameter; masks of unequal count."""
    encoder = small_encoder(topology, 2, depth)
    image = image_for(encoder, 3, grid, 2).requires_grad_()
    visible = some_visible(3, grid)
    features, gradients = [], []
    for kind in (BlockLayout, DenseMaskLayout):
        layout = kind(visible)
        dense = [layout.scatter(feature) for feature in encoder(layout.gather(image), layout)]
        loss = sum((feature * noise(*feature.shape, seed=n)).sum() for n, feature in enumerate(dense))
        features.append(dense)
        gradients.append(torch.autograd.grad(loss, [image, *encoder.parameters()]))
    for ours, theirs in zip(*features):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", [BlockLayout, DenseMaskLayout])
def test_batch_equals_one_by_one(small_encoder, topology, layout):
    """Values and gradients, with different masks and different numbers of visible cells per sample."""
    encoder, grid = small_encoder(topology), (2, 2, 3)
    image, visible = image_for(encoder, 4, grid), some_visible(4, grid)
    assert len(set(visible.flatten(1).sum(1).tolist())) > 1

    def run(rows):
        where = layout(visible[rows])
        return [where.scatter(feature) for feature in encoder(where.gather(image[rows]), where)]

    def weighted(features, rows):
        cotangents = [noise(4, *feature.shape[1:], seed=n)[rows] for n, feature in enumerate(features)]
        return sum((feature * cotangent).sum() for feature, cotangent in zip(features, cotangents))

    together = run(slice(None))
    alone = [run(slice(b, b + 1)) for b in range(4)]
    for scale, feature in enumerate(together):
        torch.testing.assert_close(feature, torch.cat([one[scale] for one in alone]), rtol=1e-11, atol=1e-11)
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad(weighted(together, slice(None)), parameters)
    summed = torch.autograd.grad(sum(weighted(one, slice(b, b + 1)) for b, one in enumerate(alone)), parameters)
    for ours, theirs in zip(gradients, summed):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_attributes(small_encoder, topology, channels):
    encoder, grid = small_encoder(topology, channels), (1, 2, 1)
    image = image_for(encoder, 2, grid, channels)
    totals = cumulative_strides(encoder.strides)
    assert encoder.junction_stride == totals[-1]
    assert encoder.grid(image.shape[2:]) == grid
    features = encoder(image)
    assert len(features) == len(encoder.feature_channels) == len(totals)
    for feature, width, total in zip(features, encoder.feature_channels, totals):
        assert tuple(feature.shape) == (2, width, *(s // t for s, t in zip(image.shape[2:], total)))
    visible = some_visible(2, grid)
    layout = BlockLayout(visible)
    for feature, width, total in zip(encoder(layout.gather(image), layout), encoder.feature_channels, totals):
        block = tuple(j // t for j, t in zip(encoder.junction_stride, total))
        assert tuple(feature.shape) == (int(visible.sum()), width, *block)


def test_paper_feature_widths(small_encoder):
    encoder = small_encoder(
        features_per_stage=[4, 6, 12, 24, 36], strides=[(1, 1, 1)] + [(2, 2, 2)] * 4, kernel_sizes=[(3, 3, 3)] * 5,
        n_blocks_per_stage=[1, 1, 3, 3, 1], expansion_per_stage=[2, 4, 4, 4, 2],
    )
    assert encoder.feature_channels == [6, 12, 24, 36, 36]
    assert encoder.junction_stride == (16, 16, 16)
    assert [len(stage) for stage in encoder.cnn.stages] == [1, 1, 3, 3, 1]


def test_one_set_of_weights(small_encoder):
    """Running sparse adds no parameter, no buffer and no state."""
    encoder = small_encoder()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    image, layout = image_for(encoder, 2, (2, 2, 2)), BlockLayout(some_visible(2, (2, 2, 2)))
    first = encoder(image)
    encoder(layout.gather(image), layout)
    assert all(torch.equal(a, b) for a, b in zip(first, encoder(image)))
    after = encoder.state_dict()
    assert list(before) == list(after) == [name for name, _ in encoder.named_parameters()]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_any_grid(small_encoder):
    """No table ties the weights to a crop size: they load and run anywhere."""
    encoder = small_encoder()
    state = encoder.state_dict()
    for grid in [(1, 1, 1), (3, 2, 4), (5, 1, 1)]:
        encoder.load_state_dict(state)
        assert encoder(image_for(encoder, 1, grid))[-1].shape[2:] == grid


def test_without_transformer_the_junction_is_the_cnn_s(small_encoder):
    encoder = small_encoder(depth=0)
    assert encoder.transformer is None
    image = image_for(encoder, 1, (2, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(encoder(image), encoder.cnn(image)))


def test_the_transformer_sees_the_whole_visible_image(small_encoder):
    """Changing one visible cell changes the tokens of all others of its sample, and of no other sample."""
    encoder = small_encoder()
    image = image_for(encoder, 2, (1, 1, 3))
    visible = torch.tensor([True, False, True]).repeat(2, 1, 1, 1)
    changed = image.clone()
    changed[0, :, :, :, :4] += 1
    layout = BlockLayout(visible)
    before, after = (encoder(layout.gather(x), layout)[-1] for x in (image, changed))
    moved = (before != after).flatten(1).any(1)
    assert moved.tolist() == [True, True, False, False]


def test_image_of_another_size_is_refused(small_encoder):
    with pytest.raises(ValueError, match=r"image of size \(8, 6, 8\) is not divisible by \(4, 4, 4\)"):
        small_encoder().grid((8, 6, 8))


@pytest.mark.parametrize("name", ["strides", "kernel_sizes", "n_blocks_per_stage", "expansion_per_stage"])
@pytest.mark.parametrize("change", ["short", "long"])
def test_lists_of_another_length_are_refused(small_encoder, name, change):
    full = {
        "strides": [(1, 1, 1), (2, 2, 2), (2, 2, 2)], "kernel_sizes": [(3, 3, 3)] * 3, "n_blocks_per_stage": [1] * 3,
        "expansion_per_stage": [2] * 3,
    }[name]
    values = full[:-1] if change == "short" else [*full, full[-1]]
    with pytest.raises(ValueError, match=f"{name} has {len(values)} entries for 3 stages; give one per stage"):
        small_encoder(**{name: values})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"features_per_stage": [4, 6]}, "strides has 3 entries for 2 stages"),
        ({"strides": [(2, 2, 2)] * 3}, r"first stage has stride \(2, 2, 2\); expected \(1, 1, 1\)"),
        ({"strides": [(1, 1, 1), (2, 2), (2, 2, 2)]}, r"stride is \(2, 2\); expected three positive whole numbers"),
        ({"strides": [(1, 1, 1), (0, 2, 2), (2, 2, 2)]}, r"stride is \(0, 2, 2\)"),
        ({"kernel_sizes": [(3, 3, 3), (2, 3, 3), (3, 3, 3)]}, r"kernel size is \(2, 3, 3\); .* odd sizes"),
        ({"features_per_stage": [4, 6, 10]}, "the junction is 10 channels wide with 2 heads"),
    ],
)
def test_impossible_stages_are_refused(small_encoder, changes, message):
    with pytest.raises(ValueError, match=message):
        small_encoder(**changes)


def test_one_stage_is_refused(small_encoder):
    with pytest.raises(ValueError, match="the encoder has 1 stage; it needs at least two"):
        small_encoder(
            features_per_stage=[6], strides=[(1, 1, 1)], kernel_sizes=[(3, 3, 3)], n_blocks_per_stage=[1],
            expansion_per_stage=[2],
        )


def test_mednext_block_is_the_paper_s():
    """Depthwise convolution, LayerNorm over channels with eps 1e-6, exact GELU, residual; written out per voxel."""
    torch.manual_seed(0)
    block, x = MedNeXtBlock(4, (3, 3, 3), 3).double(), noise(2, 4, 3, 4, 5)
    y = torch.nn.functional.conv3d(x, block.depthwise.weight, block.depthwise.bias, padding=1, groups=4)
    mean, variance = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
    y = (y - mean) / (variance + 1e-6).sqrt()
    y = y * block.norm.weight[:, None, None, None] + block.norm.bias[:, None, None, None]
    y = torch.einsum("bcdhw,oc->bodhw", y, block.expand.weight) + block.expand.bias[:, None, None, None]
    y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    y = torch.einsum("bcdhw,oc->bodhw", y, block.compress.weight) + block.compress.bias[:, None, None, None]
    torch.testing.assert_close(block(x), x + y, rtol=0, atol=1e-12)


def test_channel_layer_norm():
    norm, x = ChannelLayerNorm(5).double(), noise(2, 5, 2, 3, 4)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2)])
def test_strided_convolutions_keep_one_set_of_weights(stride):
    """A CNN that strides instead of pooling may be used too."""
    torch.manual_seed(0)
    conv, visible = Conv3d(2, 3, (3, 3, 3), stride).double(), some_visible(2, (2, 2, 2))
    x, mask = noise(2, 2, 4, 8, 8), upsample_mask(visible, (2, 4, 4))
    layout = BlockLayout(visible)
    expected = conv(x * mask) * upsample_mask(visible, tuple(s // t for s, t in zip((2, 4, 4), stride)))
    torch.testing.assert_close(layout.scatter(conv(layout.gather(x), layout)), expected, rtol=0, atol=1e-12)


def test_vit_without_blocks_is_a_norm():
    vit, tokens = ViT(6, 0, 1).double(), noise(1, 3, 6)
    assert vit(tokens, torch.arange(3)[None], (1, 1, 3)).shape == tokens.shape
