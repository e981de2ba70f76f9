"""The whole pre-training model: what it may see, batches, gradients, precision."""
import pytest
import torch

from nnunetv2_hyspark.masking import upsample_mask
from nnunetv2_hyspark.pretext.hyspark import reconstruction_loss
from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout
from nnunetv2_hyspark.sparse import layout as layout_module

TOPOLOGIES = ["isotropic", "anisotropic"]
MASKINGS = {
    "zero": {},
    "nearest": {"hidden": "nearest"},
    "not bottom-up": {"bottom_up": False},
    "segmentation decoder": {"decoder": "segmentation"},
}


@pytest.fixture(params=list(MASKINGS))
def masking(request) -> dict:
    """How the encoder is masked, or who reconstructs, as options of the model."""
    return MASKINGS[request.param]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients_of(model, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def before_norm(name: str, model) -> bool:
    """Whether this is the bias of a convolution right before a norm: the norm removes it, its gradient is zero."""
    modules = dict(model.named_modules())
    path, kind = name.rsplit(".", 1)
    parent, _, index = path.rpartition(".")
    if kind != "bias" or not index.isdigit() or not isinstance(modules[path], torch.nn.Conv3d):
        return False
    following = modules.get(f"{parent}.{int(index) + 1}")
    return isinstance(following, (torch.nn.InstanceNorm3d, torch.nn.BatchNorm3d))


@pytest.mark.parametrize("decoder", ["segmentation", "reconstruction"])
def test_rims_are_made_for_the_decoder_that_reads_them(make_model, batch, monkeypatch, decoder):
    """On a GPU each waits for the device."""
    made = []
    original = layout_module.rims
    monkeypatch.setattr(layout_module, "rims", lambda *inputs: made.append(inputs[2]) or original(*inputs))
    model = make_model("isotropic", 1, decoder=decoder)
    image, visible = batch(model)
    model(image, visible)
    assert bool(made) == (decoder == "reconstruction")
    before = len(made)
    layout = model.lay_out(visible)
    prepared = len(made) - before
    model.reconstruction(model.encode(image, layout), layout)
    assert len(made) - before == prepared, "all of them before the network runs"


@pytest.mark.parametrize("filler", ["noise", 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_masked_voxels_change_nothing(make_model, batch, topology, norm, filler, masking):
    """Features, reconstruction and every gradient stay bit-equal, whatever masked voxels hold."""
    model = make_model(topology, 2, norm=norm, **masking)
    image, visible = batch(model, channels=2)
    mask = upsample_mask(visible, model.encoder.junction_stride)
    replacement = noise(*image.shape, seed=9) if filler == "noise" else torch.full_like(image, filler)
    results = []
    for seen in (image, torch.where(mask, image, replacement)):
        seen = seen.clone().requires_grad_()
        layout = model.lay_out(visible)
        features = model.encode(seen, layout)
        reconstruction = model(seen, visible)
        loss = reconstruction_loss(image, reconstruction, visible)
        names, parameters = zip(*model.named_parameters())
        gradients = torch.autograd.grad(loss, [seen, *parameters])
        assert torch.equal(gradients[0] * ~mask, torch.zeros_like(image))
        results.append([*features, reconstruction, loss, *gradients])
    for clean, dirty in zip(*results):
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("fuse_finest", [True, False])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_visible_voxels_do_matter(make_model, batch, topology, fuse_finest):
    """Counter-check of the test above: every visible voxel has a gradient, and it moves the reconstruction."""
    model = make_model(topology, fuse_finest=fuse_finest)
    image, visible = batch(model)
    image.requires_grad_()
    loss = reconstruction_loss(image.detach(), model(image, visible), visible)
    (gradient,) = torch.autograd.grad(loss, image)
    assert torch.equal(gradient != 0, upsample_mask(visible, model.encoder.junction_stride))


@pytest.mark.parametrize("batch_size", [3, 5])
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_batch_equals_one_by_one(make_model, batch, topology, depth, batch_size, masking):
    """With instance norm a batch is its samples: reconstruction, and gradients of the sum of their losses."""
    model = make_model(topology, depth=depth, **masking)
    image, visible = batch(model, batch_size)
    assert len(set(visible.flatten(1).sum(1).tolist())) > 1
    together = model(image, visible)
    alone = torch.cat([model(image[b : b + 1], visible[b : b + 1]) for b in range(batch_size)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)

    def total(reconstruction):
        rows = [slice(b, b + 1) for b in range(batch_size)]
        return sum(reconstruction_loss(image[row], reconstruction[row], visible[row]) for row in rows)

    torch.testing.assert_close(total(together), total(alone), rtol=1e-11, atol=0)
    ours, theirs = gradients_of(model, total(together)), gradients_of(model, total(alone))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-10, msg=name)


def test_order_of_the_batch_does_not_matter(make_model, batch):
    model = make_model()
    image, visible = batch(model, 4)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(model(image, visible)[order], model(image[order], visible[order]), rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("fuse_finest", [True, False])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_blocks_equal_the_masked_reference(make_model, batch, topology, fuse_finest, norm, masking):
    ours, reference = (
        make_model(topology, 2, fuse_finest=fuse_finest, norm=norm, layout=kind, **masking)
        for kind in (BlockLayout, DenseMaskLayout)
    )
    image, visible = batch(ours, channels=2)
    reconstructions = [model(image, visible) for model in (ours, reference)]
    torch.testing.assert_close(*reconstructions, rtol=1e-11, atol=1e-11)
    first, second = (
        gradients_of(model, reconstruction_loss(image, reconstruction, visible))
        for model, reconstruction in zip((ours, reference), reconstructions)
    )
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_not_bottom_up_is_the_cnn_on_an_image_with_holes(make_model, batch, topology):
    """At visible cells its features are those of the whole image with zeros, unlike the submanifold CNN's."""
    model, other = make_model(topology, bottom_up=False), make_model(topology)
    image, visible = batch(model)
    holes = image * upsample_mask(visible, model.encoder.junction_stride)
    layout = model.lay_out(visible)
    ours = [layout.scatter(feature) for feature in model.encode(image, layout)]
    submanifold = [layout.scatter(feature) for feature in other.encode(image, layout)]
    *skips, junction = model.encoder.cnn(holes)
    tokens = model.encoder.transform(layout.gather(junction), layout)
    for feature, dense, sparse in zip(ours, [*skips, layout.scatter(tokens)], submanifold):
        block = tuple(f // g for f, g in zip(feature.shape[2:], visible.shape[1:]))
        torch.testing.assert_close(feature, dense * upsample_mask(visible, block), rtol=0, atol=1e-12)
        assert (feature - sparse).abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("fuse_finest", [True, False])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_parameter_is_trained(make_model, batch, topology, fuse_finest, depth, norm):
    """No parameter is idle, but for the official variant's biases, which its batch norms remove."""
    check_all_trained(make_model(topology, depth=depth, fuse_finest=fuse_finest, norm=norm), batch)


@pytest.mark.parametrize(
    "options",
    [{"skips": "add"}, {"skips": "none"}, {"bottom_up": False}, {"hidden": "nearest"}, {"decoder": "segmentation"}],
    ids=str,
)
def test_every_parameter_of_a_variant_is_trained(make_model, batch, options):
    check_all_trained(make_model(**options), batch)


def check_all_trained(model, batch):
    image, visible = batch(model)
    gradients = gradients_of(model, reconstruction_loss(image, model(image, visible), visible))
    removed = {name for name in gradients if before_norm(name, model)}
    decoder = model.reconstruction
    idle = 2 * (len(decoder.up) + len(decoder.fuse)) if list(model.buffers()) else 0
    assert len(removed) == idle
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        if name in removed:
            assert gradient.abs().max() < 1e-12, name
        else:
            assert gradient.abs().max() > 1e-9, name


@pytest.mark.parametrize("grid", [(1, 1, 2), (3, 3, 3), (1, 2, 3), (4, 1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_grid_and_channels(make_model, batch, grid, channels):
    model = make_model("anisotropic", channels)
    image, visible = batch(model, 2, grid, channels)
    assert model(image, visible).shape == image.shape


def test_draw_mask(make_model):
    model = make_model("anisotropic")
    visible = model.draw_mask(3, (4, 12, 8), 0.75, torch.Generator().manual_seed(0))
    assert visible.shape == (3, 2, 3, 2)
    assert visible.flatten(1).sum(1).tolist() == [3, 3, 3]
    again = model.draw_mask(3, (4, 12, 8), 0.75, torch.Generator().manual_seed(0))
    assert torch.equal(visible, again)
    with pytest.raises(ValueError, match="is not divisible by"):
        model.draw_mask(1, (5, 12, 8), 0.75, torch.Generator().manual_seed(0))


def test_no_state_between_steps(make_model, batch):
    """A step with another mask in between changes nothing; instance norm has no running statistics."""
    model = make_model()
    image, visible = batch(model)
    first = model(image, visible)
    model(image, visible.flip(0))
    assert torch.equal(first, model(image, visible))
    assert not list(model.buffers())


def test_float32_agrees_with_float64(make_model, batch):
    model = make_model()
    image, visible = batch(model)
    exact = model(image, visible)
    assert (model.float()(image.float(), visible) - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("fuse_finest", [True, False])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_bfloat16_autocast(make_model, batch, topology, fuse_finest):
    """Forward and backward run; loss within 3 %, gradients finite, in float32, and of the right direction."""
    model = make_model(topology, 2, fuse_finest=fuse_finest).float()
    image, visible = batch(model, channels=2)
    image = image.float()
    exact = reconstruction_loss(image, model(image, visible), visible)
    exact_gradients = gradients_of(model, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = reconstruction_loss(image, model(image, visible), visible)
    gradients = gradients_of(model, loss)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())
    ours, theirs = (torch.cat([g.flatten() for g in grads.values()]) for grads in (gradients, exact_gradients))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.95


def test_training_lowers_the_loss(make_model, batch):
    """A few steps on one batch overfit it."""
    model = make_model(depth=1).float()
    image, visible = batch(model)
    image = image.float()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = reconstruction_loss(image, model(image, visible), visible)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
