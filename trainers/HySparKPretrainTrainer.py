"""Self-supervised pre-training of the hybrid encoder by HySparK."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_hyspark.data.cases import find_image
from nnunetv2_hyspark.data.loader import Batches, CropBatches
from nnunetv2_hyspark.geometry import Size3, as_size3
from nnunetv2_hyspark.masking import count_visible, random_visible, random_visible_between
from nnunetv2_hyspark.pretext.build import build_hyspark, with_decoder_width
from nnunetv2_hyspark.pretext.hyspark import HySparK, HySparKConfig, reconstruction_loss
from nnunetv2_hyspark.sparse.backends import choose_backend
from nnunetv2_hyspark.training.diagnosis import new_signs, representation_health
from nnunetv2_hyspark.training.distributed import gather, split_batch
from nnunetv2_hyspark.training.epoch import EpochSoFar
from nnunetv2_hyspark.training.memory import peak_memory_gb
from nnunetv2_hyspark.training.parameters import decay_groups
from nnunetv2_hyspark.training.previews import Previews, spread_evenly
from nnunetv2_hyspark.training.probe import LinearProbe, load_labelled_crops
from nnunetv2_hyspark.training.progress import PretrainingLog, remaining_time
from nnunetv2_hyspark.training.refused_load import write_refusal
from nnunetv2_hyspark.training.resumable import ResumableTrainer
from nnunetv2_hyspark.training.schedule import WarmupCosineSchedule
from nnunetv2_hyspark.training.settings import Settings
from nnunetv2_hyspark.training.tensorboard import TensorBoardLogger
from nnunetv2_hyspark.training.trainer import HySparKTrainer, unwrap
from nnunetv2_hyspark.training.validation import evenly_spread, validate_cases, write_summary
from nnunetv2_hyspark.transfer.loading import load_pretraining


class HySparKPretrainTrainer(ResumableTrainer):
    """Pre-trains on the images of a preprocessed data set; its labels are never looked at."""

    stage = "pretraining"
    beside_the_network = ("decoder.",)

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.logger.local_logger = PretrainingLog()
        self.inference_allowed_mirroring_axes = tuple(self.options.flip_axes)
        self.seconds_before = 0.0
        self.previews: Previews | None = None
        self.probe: LinearProbe | None = None
        if self.settings.unplanned:
            planned, now = (
                ",".join(
                    f"{key}={str(values[i]).lower() if isinstance(values[i], bool) else values[i]}"
                    for key, values in self.settings.unplanned.items()
                )
                for i in (0, 1)
            )
            self.print_to_log_file(
                f"WARNING: the plan's batch of {self.options.batch_size} crops fits its memory target with {planned}; "
                f"this run has {now} and may need more, or leave some; plan again with nnUNet_hyspark={now}, or set a "
                f"batch_size.", add_timestamp=False,
            )

    @staticmethod
    def check_configuration(name: str, configuration: dict[str, Any]) -> None:
        """3D and no cascade: the second stage of a cascade needs segmentations, which pre-training has not."""
        HySparKTrainer.check_configuration(name, configuration)
        if configuration.get("previous_stage") is not None:
            raise ValueError(
                f"configuration {name} is the second stage of a cascade and needs segmentations of "
                f"{configuration['previous_stage']}; pre-train on 3d_fullres or 3d_lowres."
            )

    @property
    def model(self) -> HySparK:
        """The network, whatever wraps it. Raises TypeError if a subclass has built another kind."""
        network = unwrap(self.network)
        if not isinstance(network, HySparK):
            raise TypeError(
                f"the network to pre-train is a {type(network).__name__}; expected HySparK, as "
                f"HySparKPretrainTrainer.build_network_architecture makes."
            )
        return network

    @property
    def patch_size(self) -> Size3:
        """Voxels of a crop per axis."""
        return as_size3(self.configuration_manager.patch_size)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm per voxel of the preprocessed images."""
        first, second, third = (float(s) for s in self.configuration_manager.spacing)
        return first, second, third

    def initialize(self) -> None:
        """nnU-Net's, after checking that masks can be drawn on this patch."""
        architecture = self.configuration_manager.configuration["architecture"]["arch_kwargs"]
        encoder_strides = np.prod(architecture["strides"], axis=0)
        if any(p % s for p, s in zip(self.patch_size, encoder_strides)):
            raise ValueError(
                f"patch size {list(self.patch_size)} is not divisible by the network's strides "
                f"{encoder_strides.tolist()}; change patch_size in the plans, or plan with -pl HySparKPlanner."
            )
        grid = as_size3(int(p // s) for p, s in zip(self.patch_size, encoder_strides))
        for ratio in (self.options.mask_ratio, self.options.lowest_mask_ratio):
            count_visible(grid, ratio)
        if self.options.lowest_mask_ratio > self.options.mask_ratio:
            raise ValueError(
                f"mask_ratio_low is {self.options.mask_ratio_low}, above mask_ratio {self.options.mask_ratio}; "
                f"expected a ratio up to it, or 0 for none."
            )
        super().initialize()
        self.model.compute_with(
            choose_backend(
                self.options.backend, self.device, lambda why: self.print_to_log_file(f"WARNING: {why}")
            )
        )
        self.hand_over_loader(self.model)

    def load_pretrained(self, filename: str) -> None:
        """Goes on from another pre-training, or from an imported file: loads its encoder, and its decoder
        where that is of the same kind and fits; the report goes into the log and into ``load_report.json``."""
        report = load_pretraining(self.model, filename, functools.partial(write_refusal, self))
        self.write_load_report(report)

    def _do_i_compile(self) -> bool:
        """As nnU-Net, but only where ``nnUNet_compile`` asks for it.

        The compiler turns writes into parts of a map, of which up-sampling and projection consist, into copies of the
        whole map, and takes minutes for them.
        """
        return "nnUNet_compile" in os.environ and super()._do_i_compile()

    @staticmethod
    def complete_settings(settings: Settings, arch_kwargs: Mapping[str, Any]) -> Settings:
        """The settings with the width of the paper's decoder, where that reconstructs, as a number."""
        return replace(settings, pretraining=with_decoder_width(settings.pretraining, arch_kwargs))

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The encoder of the plan's network with a decoder that reconstructs."""
        options = HySparKConfig(**configuration_manager.configuration["hyspark"]["pretraining"])
        return build_hyspark(num_input_channels, configuration_manager.network_arch_init_kwargs, options)

    def configure_optimizers(self):
        """AdamW with warm-up and cosine."""
        options = self.options
        optimizer = torch.optim.AdamW(decay_groups(self.network, options.weight_decay), lr=options.learning_rate)
        schedule = WarmupCosineSchedule(
            optimizer, options.learning_rate, self.num_epochs, options.warmup_epochs, self.num_iterations_per_epoch
        )
        return optimizer, schedule

    def _build_loss(self):
        return functools.partial(reconstruction_loss, target=self.options.target)

    def _set_batch_size_and_oversample(self) -> None:
        world_size, rank = (self.world_size, self.rank) if self.is_ddp else (1, 0)
        self.positions = split_batch(self.configuration_manager.batch_size, world_size, rank)
        self.batch_size = len(self.positions)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none."""

    def _images(self, identifiers: list[str]) -> list[tuple[str, Path]]:
        found = []
        for name in identifiers:
            try:
                found.append((name, find_image(self.preprocessed_dataset_folder, name)))
            except FileNotFoundError as error:
                if self.options.on_broken_case == "stop":
                    raise
                self.print_to_log_file(f"WARNING: {name} is left out: {error}")
        return found

    def _crops(self, identifiers: list[str], purpose: int, flip_axes: tuple[int, ...], in_order: bool) -> CropBatches:
        cases = self._images(identifiers)
        grid, options = self.model.encoder.grid(self.patch_size), self.options
        draw_mask = functools.partial(random_visible, 1, grid, options.mask_ratio)
        if options.mask_ratio_low and not in_order:
            draw_mask = functools.partial(
                random_visible_between, 1, grid, options.mask_ratio_low, options.mask_ratio
            )
        # label 1 of other data sets is an annotation, and annotations are never looked at
        has_mask = "foreground_mask" in self.dataset_json.get("hyspark", {})
        return CropBatches(
            [path for _, path in cases],
            [name for name, _ in cases],
            self.patch_size,
            self.positions,
            draw_mask,
            (options.seed, purpose),
            flip_axes,
            in_order,
            self.configuration_manager.batch_size,
            options.on_broken_case,
            options.foreground_fraction if has_mask else 0.0,
        )

    def get_dataloaders(self) -> tuple[Batches, Batches]:
        """Random crops for training; the same crops and masks every epoch for validation."""
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        train, held_out = self.do_split()
        workers = get_allowed_n_proc_DA()
        pin, timeout = self.device.type == "cuda", self.options.data_timeout
        steps = range(self.step, max(self.num_epochs * self.num_iterations_per_epoch, self.step + 1))
        training = self._crops(train, 0, self.options.flip_axes, in_order=False)
        validation = self._crops(held_out, 1, (), in_order=True)
        fixed, few = range(self.num_val_iterations_per_epoch), max(1, workers // 2) if workers else 0
        return (
            Batches(training, steps, workers, pin, timeout=timeout),
            Batches(validation, fixed, few, pin, repeat=True, timeout=timeout),
        )

    def on_train_start(self) -> None:
        """nnU-Net's; prepares previews and probe, and says what is masked."""
        super().on_train_start()
        options, encoder = self.options, self.model.encoder
        if options.mask_ratio_low:
            # the number of blocks changes from step to step, and cuDNN would try its algorithms for every number
            torch.backends.cudnn.benchmark = False
        _, held_out = self.do_split()
        shown = spread_evenly(held_out, options.preview_cases)[self.rank :: self.world_size]
        self.previews = Previews(
            self.folder / "previews", self._images(shown), self.patch_size, self.spacing, options.mask_ratio,
            options.seed, self.print_to_log_file,
        )
        if options.probe_dataset and self.rank == 0:
            crops = load_labelled_crops(
                options.probe_dataset, self.configuration_manager.data_identifier, self.patch_size,
                self.num_input_channels, 2 * options.probe_cases,
            )
            self.probe = LinearProbe(crops, self.device)
        if options.tensorboard and self.rank == 0:
            board = TensorBoardLogger(self.output_folder)
            board.update_config({
                "settings": self.settings.as_dict(self.stage),
                "configuration": self.configuration_manager.configuration,
            })
            self.logger.loggers.append(board)
        grid = encoder.grid(self.patch_size)
        parameters = sum(p.numel() for p in encoder.parameters())
        self.print_to_log_file(
            f"masking: {grid[0]}x{grid[1]}x{grid[2]} cells of {'x'.join(map(str, encoder.junction_stride))} voxels, "
            f"{count_visible(grid, options.mask_ratio)} visible per crop; encoder {parameters:,} parameters; "
            f"batch {self.configuration_manager.batch_size} crops over {self.world_size} process(es)"
        )
        self.seconds_before = self.so_far.seconds
        if self.so_far.step:
            self.print_to_log_file(f"epoch {self.current_epoch} goes on at step {self.so_far.step}")

    def compute_loss(self, image: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Reconstruction loss of crops."""
        with torch.autocast(self.device.type) if self.device.type == "cuda" else dummy_context():
            reconstruction = self.network(image, visible)
        return self.loss(image, reconstruction, visible)

    def on_train_epoch_start(self) -> None:
        """nnU-Net's; starts the memory meter."""
        super().on_train_epoch_start()
        self.logger.log("weight_decays", self.weight_decay, self.current_epoch)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Logs loss, gradient norm, speed, waiting and memory."""
        values = self.so_far.means(self.options.gradient_clip)
        values["peak_memory_gb"] = peak_memory_gb(self.device)
        for key, value in values.items():
            self.logger.log(key, value, self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        """nnU-Net's; the first batch tells how the representation is."""
        super().on_validation_epoch_start()
        self.health_is_due = True

    def validation_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """Reconstruction loss of a fixed batch."""
        if self.health_is_due:
            self.health_is_due = False
            with torch.autocast(self.device.type) if self.device.type == "cuda" else dummy_context():
                rank, deviation = representation_health(self.model, *self.in_parts(batch)[0])
            self.logger.log("effective_rank", rank, self.current_epoch)
            self.logger.log("reconstruction_deviation", deviation, self.current_epoch)
        return super().validation_step(batch)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Logs the mean; draws previews and fits the probe where they are due."""
        self.logger.log("val_losses", float(np.mean([o["loss"] for o in val_outputs])), self.current_epoch)
        done = self.current_epoch + 1
        is_last = done == self.num_epochs
        every = self.options.preview_every
        if self.previews is not None and every and (done % every == 0 or done == 1 or is_last):
            self.previews.draw(self.model, done, self.device)
        if self.probe is not None and (done % self.options.probe_every == 0 or done == 1 or is_last):
            dice = self.probe.score(self.model.encoder)
            self.logger.log("probe_dice", dice, self.current_epoch)
            self.print_to_log_file(f"linear probe: Dice {dice:.4f}")

    def on_epoch_end(self) -> None:
        """Prints the epoch and signs of trouble, writes checkpoints and progress.png."""
        self.epoch_is_open = False
        self.so_far = EpochSoFar()
        epoch = self.current_epoch
        self.logger.log("epoch_end_timestamps", time(), epoch)
        log = self.logger.local_logger.my_fantastic_logging
        last = {key: values[-1] if values else math.nan for key, values in log.items()}
        self.print_to_log_file(f"train_loss {last['train_losses']:.4f}")
        self.print_to_log_file(f"val_loss {last['val_losses']:.4f}")
        self.print_to_log_file(
            f"gradient norm {last['gradient_norms']:.3g}, {last['clipped_steps']:.0%} of the steps clipped, "
            f"{last['skipped_steps']:.0f} skipped, weight decay {last['weight_decays']:g}"
        )
        self.print_to_log_file(
            f"{last['crops_per_second']:.2f} crops/s, {last['waiting_for_data']:.0%} of the time waiting for data, "
            f"{last['peak_memory_gb']:.2f} GB at most, {last['background_crops']:.0%} of the crops background only"
        )
        self.print_to_log_file(
            f"effective rank {last['effective_rank']:.1f}, deviation of the prediction "
            f"{last['reconstruction_deviation']:.3f}"
        )
        duration = last["epoch_end_timestamps"] - last["epoch_start_timestamps"] + self.seconds_before
        self.seconds_before = 0.0
        left = remaining_time(log["epoch_start_timestamps"], log["epoch_end_timestamps"], self.num_epochs - epoch - 1)
        self.print_to_log_file(f"Epoch time: {duration:.2f} s, about {left} to go")
        for sign in new_signs(log, self.options.learning_rate):
            self.print_to_log_file(f"SIGN OF TROUBLE: {sign}")
        self.save_epoch()
        if self.rank == 0:
            try:
                self.logger.plot_progress_png(self.output_folder)
            except OSError as error:
                self.print_to_log_file(f"WARNING: progress.png was not written: {error}")
        self.current_epoch += 1

    def on_train_end(self) -> None:
        """nnU-Net's; ends the loaders."""
        super().on_train_end()
        for loader in (self.dataloader_train, self.dataloader_val):
            loader.close()

    def checkpoint_weights(self) -> dict[str, torch.Tensor]:
        """The pre-training network's weights, and a segmentation decoder under ``decoder.``, so that nnU-Net's own
        ``-pretrained_weights``, which wants every key of a network, accepts the file. That decoder is the
        one that reconstructed, with fresh segmentation layers; where the paper's reconstructed, it is fresh."""
        weights = dict(super().checkpoint_weights())
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too, for good
            segmentation = get_network_from_plans(
                self.configuration_manager.network_arch_class_name,
                self.configuration_manager.network_arch_init_kwargs,
                self.configuration_manager.network_arch_init_kwargs_req_import,
                self.num_input_channels,
                2,
            )
        fresh = segmentation.state_dict()
        weights.update({name: tensor for name, tensor in fresh.items() if name.startswith("decoder.")})
        inside = "reconstruction."
        weights.update({
            name.removeprefix(inside): tensor for name, tensor in weights.items()
            if name.startswith(f"{inside}decoder.")
        })
        return weights

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Reconstructs held-out cases: ``validation/summary.json`` and a picture per case. The last thing of a run."""
        self.network.eval()
        _, all_held_out = self.do_split()
        held_out = evenly_spread(all_held_out, self.options.validation_cases)
        if len(held_out) < len(all_held_out):
            self.print_to_log_file(
                f"Reconstructing {len(held_out)} of {len(all_held_out)} cases; validation_cases=0 is for all"
            )
        folder = self.folder / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        results = validate_cases(
            self.model, self._images(held_out), self.patch_size, self.spacing, self.options.mask_ratio,
            self.options.seed, self.device, folder, self.print_to_log_file, self.rank, self.world_size,
            self.options.on_broken_case == "skip",
        )
        results = [result for part in gather(results) for result in part]
        if self.rank == 0:
            means = write_summary(folder / "summary.json", results, self.options.mask_ratio, self.options.target)
            self.print_to_log_file("Validation complete", also_print_to_console=True)
            if means:
                self.print_to_log_file(f"Mean reconstruction loss: {means['loss']:.4f}", also_print_to_console=True)
            else:
                self.print_to_log_file("WARNING: no held-out case could be read, so there is no reconstruction loss.")
        self.leave_process_group()
