"""The memory model counts what a real step allocates, and extrapolates it exactly enough."""
import pytest
import torch

from nnunetv2_hyspark.linear import layer_by_layer
from nnunetv2_hyspark.networks.segmentation import HySparKUNet
from nnunetv2_hyspark.planning.fitting import TargetTooSmall, fit, fit_patch
from nnunetv2_hyspark.planning.memory import Line, MemoryModel, device_bytes
from nnunetv2_hyspark.planning.steps import trace_finetuning, trace_pretraining
from nnunetv2_hyspark.planning.trace import LiveBytes
from nnunetv2_hyspark.pretext.build import build_hyspark
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig, reconstruction_loss

from .conftest import small_arch_kwargs

PATCH = (32, 32, 32)


@pytest.mark.parametrize("decoder", ["segmentation", "reconstruction"])
def test_counted_bytes_of_pretraining_are_those_of_a_real_step(decoder):
    config = HySparKConfig(decoder=decoder)
    network = build_hyspark(1, small_arch_kwargs(), config)
    image = torch.randn(2, 1, *PATCH)
    visible = network.draw_mask(2, PATCH, config.mask_ratio, torch.Generator().manual_seed(0))
    with layer_by_layer(), LiveBytes() as live:
        reconstruction_loss(image, network(image, visible), visible).backward()
    traced = trace_pretraining(1, small_arch_kwargs(), config, PATCH, 2, mixed=False)
    real = live.peak + traced.weights + image.nbytes
    assert traced.peak == pytest.approx(real, rel=0.05)


def test_counted_bytes_hold_what_autograd_keeps():
    network = HySparKUNet(2, 3, **small_arch_kwargs(), deep_supervision=True)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with layer_by_layer(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(torch.randn(2, 2, *PATCH))
    assert len(outputs) == 3
    traced = trace_finetuning(2, 3, small_arch_kwargs(), PATCH, 2, mixed=False)
    # the peak is 1.136 times what is kept, for any weights and 1.135 for larger patches: the backward pass adds the
    # gradients at hand. One map of the finest scale more or less would be 0.053 at least; 0.045 leaves some room for
    # the temporary tensors of another version of PyTorch.
    assert traced.peak / sum(kept.values()) == pytest.approx(1.136, abs=0.045)


@pytest.mark.parametrize("patch", [PATCH, (64, 64, 64)])
def test_mixed_precision_needs_less(patch):
    exact, mixed = (trace_finetuning(1, 3, small_arch_kwargs(), patch, 2, m).peak for m in (False, True))
    assert 0.4 * exact < mixed < 0.95 * exact


@pytest.mark.parametrize("decoder", ["segmentation", "reconstruction"])
def test_memory_grows_linearly_with_voxels(decoder):
    model = MemoryModel(1, 3, small_arch_kwargs(), HySparKConfig(decoder=decoder))
    for patch, crops in (((64, 64, 96), 2), ((128, 128, 128), 5)):
        for line, trace in (
            (model.pretraining, model.trace_pretraining), (model.finetuning, model.trace_finetuning)
        ):
            assert line.gb(patch, crops) == pytest.approx(device_bytes(trace(patch, crops)) / 1e9, rel=0.03)


def test_a_trace_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trace_finetuning(1, 2, small_arch_kwargs(), PATCH, 1)
    assert torch.equal(before, torch.get_rng_state())


class _Model:
    """1 GB and 1 GB per 100 voxels; fine-tuning twice that."""

    pretraining = Line(1e9, 1e7)
    finetuning = Line(1e9, 2e7)


def test_the_largest_patch_that_fits_is_chosen_and_memory_left_over_is_for_the_batch():
    candidates = [(10, 10, 10), (8, 10, 10), (4, 10, 10), (2, 10, 10)]
    fitted = fit(_Model(), candidates, 20.0, 1e9)
    assert fitted.patch_size == (4, 10, 10)
    assert (fitted.pretraining_batch, fitted.finetuning_batch) == (4, 2)
    assert max(fitted.pretraining_gb, fitted.finetuning_gb) <= 20.0


def test_a_batch_never_sees_too_much_of_a_small_data_set():
    assert fit(_Model(), [(2, 10, 10)], 80.0, 600).pretraining_batch == 3


def test_a_target_that_is_too_small_says_what_works():
    advice = r"2x10x10 voxels, 2 per batch.*gpu_memory_target 9\.0 or more, or with a smaller base_width"
    with pytest.raises(TargetTooSmall, match=advice) as caught:
        fit_patch([_Model.finetuning], [(4, 10, 10), (2, 10, 10)], 8.0)
    assert fit_patch([_Model.finetuning], [(2, 10, 10)], caught.value.required_gb) == (2, 10, 10)
