"""The paper's decoder against equations 3 and 4 written out."""
import pytest
import torch
from torch import nn

from nnunetv2_hyspark.masking import upsample_mask
from nnunetv2_hyspark.networks.reconstruction import SKIPS, ReconstructionDecoder, TransferableDecoder, decoder_norm
from nnunetv2_hyspark.networks.segmentation import MedNeXtDecoder, build_encoder
from nnunetv2_hyspark.sparse import BlockLayout

STRIDES = [(1, 1, 1), (1, 2, 2), (2, 2, 2)]
KERNELS = [(1, 3, 3), (3, 3, 3), (3, 3, 3)]
CHANNELS = [3, 5, 6]


def make(**changes) -> ReconstructionDecoder:
    torch.manual_seed(0)
    kwargs = {"output_channels": 2, "width": 8, **changes}
    return ReconstructionDecoder(
        feature_channels=CHANNELS, strides=STRIDES, kernel_sizes=KERNELS, **kwargs
    ).double()


@pytest.fixture
def features():
    """Dense features of two samples, their mask, and the layout."""
    torch.manual_seed(1)
    visible = torch.rand(2, 2, 2, 2) < 0.5
    visible[:, 0, 0, 0] = True
    sizes = [(4, 8, 8), (4, 4, 4), (2, 2, 2)]
    dense = [torch.randn(2, c, *size, dtype=torch.float64) for c, size in zip(CHANNELS, sizes)]
    return dense, visible, BlockLayout(visible)


@pytest.mark.parametrize("skips", SKIPS)
@pytest.mark.parametrize("fuse_finest", [True, False])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_equations(features, fuse_finest, norm, skips):
    """Densify with the scale's token, project, start at the junction, up-sample and fuse scale by scale."""
    dense, visible, layout = features
    decoder = make(fuse_finest=fuse_finest, norm=norm, skips=skips)
    fused = 1 if skips == "none" else 3 if fuse_finest else 2
    projected = []
    for step, scale in enumerate([2, 1, 0][:fused]):
        feature, token = dense[scale], decoder.mask_tokens[step]
        mask = upsample_mask(visible, tuple(f // g for f, g in zip(feature.shape[2:], visible.shape[1:])))
        filled = torch.where(mask, feature, token[None, :, None, None, None])
        projected.append(nn.Conv3d.forward(decoder.projections[step], filled))
    x = projected[0]
    for step, up in enumerate(decoder.up):
        x = up.convs(up.upsample(x))
        if step + 1 < fused and skips == "concatenate":
            x = decoder.fuse[step](torch.cat([x, projected[step + 1]], 1))
        elif step + 1 < fused:
            x = x + projected[step + 1]
    expected = decoder.head(x)
    ours = decoder([layout.gather(feature) for feature in dense], layout)
    assert ours.shape == (2, 2, 4, 8, 8)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("output_channels", [1, 3])
def test_segmentation_decoder(features, output_channels):
    """The segmentation network's decoder on the densified features, with the head in place of its last layer."""
    dense, visible, layout = features
    torch.manual_seed(2)
    encoder = build_encoder(1, [4, 3, 6], STRIDES, KERNELS, [1, 1, 1], [2, 2, 2], 1, 1, 2.0)
    encoder.feature_channels = CHANNELS

    def make_decoder(classes: int) -> MedNeXtDecoder:
        return MedNeXtDecoder(encoder, classes, [4, 3], KERNELS[:-1], [1, 2], 2, deep_supervision=False).double()

    ours = TransferableDecoder(output_channels, CHANNELS, make_decoder(0), 4).double()
    assert not [name for name in ours.state_dict() if ".seg_layers." in name]
    decoder = make_decoder(output_channels)
    decoder.load_state_dict(ours.decoder.state_dict(), strict=False)
    decoder.seg_layers[-1].load_state_dict(ours.head.state_dict())
    filled = [
        torch.where(upsample_mask(visible, tuple(f // g for f, g in zip(x.shape[2:], visible.shape[1:]))), x,
                    token[None, :, None, None, None])
        for x, token in zip(dense, ours.mask_tokens)
    ]
    reconstruction = ours([layout.gather(feature) for feature in dense], layout)
    assert reconstruction.shape == (2, output_channels, 4, 8, 8)
    torch.testing.assert_close(reconstruction, decoder(filled), rtol=0, atol=1e-11)


def test_parts():
    decoder = make()
    assert [tuple(t.shape) for t in decoder.mask_tokens] == [(6,), (5,), (3,)]
    assert [p.out_channels for p in decoder.projections] == [8, 4, 2]
    assert [p.kernel_size for p in decoder.projections] == [(1, 1, 1), (3, 3, 3), (1, 3, 3)]
    assert [u.upsample.stride for u in decoder.up] == [(2, 2, 2), (1, 2, 2)]
    assert all(token.abs().max() <= 0.02 and token.abs().max() > 0 for token in decoder.mask_tokens)
    without = make(fuse_finest=False)
    assert [len(part) for part in (without.mask_tokens, without.projections, without.fuse)] == [2, 2, 1]
    added, none = make(skips="add"), make(skips="none")
    assert [len(part) for part in (added.mask_tokens, added.projections, added.fuse)] == [3, 3, 0]
    assert [len(part) for part in (none.mask_tokens, none.projections, none.fuse)] == [1, 1, 0]


def test_width_must_be_halved_often_enough():
    with pytest.raises(ValueError, match="decoder_width is 10; with 3 scales it must be a multiple of 4"):
        make(width=10)


def test_unknown_skips():
    with pytest.raises(ValueError, match="skips is 'sum'; expected one of concatenate, add, none"):
        make(skips="sum")


def test_unknown_norm():
    with pytest.raises(ValueError, match="decoder_norm is 'group'; expected 'instance' or 'batch'"):
        decoder_norm("group", 4)
