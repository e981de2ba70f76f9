"""Self-supervised pre-training of the hybrid encoder by HySparK."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from time import perf_counter, time
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn

from nnunetv2_hyspark.data.cases import find_image
from nnunetv2_hyspark.data.loader import Batches, CropBatches
from nnunetv2_hyspark.geometry import as_size3
from nnunetv2_hyspark.masking import count_visible, random_visible
from nnunetv2_hyspark.pretext.build import build_hyspark
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig, reconstruction_loss
from nnunetv2_hyspark.training.parameters import decay_groups
from nnunetv2_hyspark.training.progress import PretrainingLog
from nnunetv2_hyspark.training.schedule import WarmupCosineSchedule
from nnunetv2_hyspark.training.trainer import HySparKTrainer, split_batch, unwrap
from nnunetv2_hyspark.training.validation import validate_cases


class HySparKPretrainTrainer(HySparKTrainer):
    """Pre-trains on the images of a preprocessed data set; its labels are never looked at."""

    stage = "pretraining"

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
        self.inference_allowed_mirroring_axes = tuple(self.settings.pretraining.flip_axes)

    @staticmethod
    def check_configuration(name: str, configuration: dict[str, Any]) -> None:
        """3D and no cascade: the second stage of a cascade needs segmentations, which pre-training has not."""
        HySparKTrainer.check_configuration(name, configuration)
        if configuration.get("previous_stage") is not None:
            raise ValueError(
                f"configuration {name} is the second stage of a cascade and needs segmentations of "
                f"{configuration['previous_stage']}; pre-train on 3d_fullres or 3d_lowres."
            )

    def initialize(self) -> None:
        """nnU-Net's, after checking that masks can be drawn on this patch."""
        architecture = self.configuration_manager.configuration["architecture"]["arch_kwargs"]
        encoder_strides = np.prod(architecture["strides"], axis=0)
        patch = list(self.configuration_manager.patch_size)
        if any(p % s for p, s in zip(patch, encoder_strides)):
            raise ValueError(
                f"patch size {patch} is not divisible by the network's strides {encoder_strides.tolist()}; "
                f"change patch_size in the plans, or plan with -pl HySparKPlanner."
            )
        grid = as_size3(int(p // s) for p, s in zip(patch, encoder_strides))
        count_visible(grid, self.settings.pretraining.mask_ratio)
        super().initialize()

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The encoder of the plan's network with a reconstruction decoder."""
        options = HySparKConfig(**configuration_manager.configuration["hyspark"]["pretraining"])
        return build_hyspark(num_input_channels, configuration_manager.network_arch_init_kwargs, options)

    def configure_optimizers(self):
        """AdamW with warm-up and cosine."""
        options = self.settings.pretraining
        optimizer = torch.optim.AdamW(decay_groups(self.network, options.weight_decay), lr=options.learning_rate)
        schedule = WarmupCosineSchedule(
            optimizer, options.learning_rate, self.num_epochs, options.warmup_epochs, self.num_iterations_per_epoch
        )
        return optimizer, schedule

    def _build_loss(self):
        return reconstruction_loss

    def _set_batch_size_and_oversample(self) -> None:
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if self.is_ddp else (1, 0)
        self.positions = split_batch(self.configuration_manager.batch_size, world_size, rank)
        self.batch_size = len(self.positions)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none."""

    def _crops(self, identifiers: list[str], purpose: int, flip_axes: tuple[int, ...], in_order: bool) -> CropBatches:
        options = self.settings.pretraining
        patch_size = as_size3(self.configuration_manager.patch_size)
        grid = unwrap(self.network).encoder.grid(patch_size)
        return CropBatches(
            [find_image(self.preprocessed_dataset_folder, name) for name in identifiers],
            identifiers,
            patch_size,
            self.positions,
            functools.partial(random_visible, 1, grid, options.mask_ratio),
            (options.seed, purpose),
            flip_axes,
            in_order,
        )

    def get_dataloaders(self) -> tuple[Batches, Batches]:
        """Random crops for training; the same crops and masks every epoch for validation."""
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        train, held_out = self.do_split()
        workers = get_allowed_n_proc_DA()
        pin = self.device.type == "cuda"
        first = self.current_epoch * self.num_iterations_per_epoch
        steps = range(first, max(self.num_epochs * self.num_iterations_per_epoch, first + 1))
        training = self._crops(train, 0, self.settings.pretraining.flip_axes, in_order=False)
        validation = self._crops(held_out, 1, (), in_order=True)
        return (
            Batches(training, steps, workers, pin),
            Batches(validation, range(self.num_val_iterations_per_epoch), max(1, workers // 2) if workers else 0, pin,
                    repeat=True),
        )

    def on_train_start(self) -> None:
        """nnU-Net's; says what is masked."""
        super().on_train_start()
        network = unwrap(self.network)
        grid = network.encoder.grid(self.configuration_manager.patch_size)
        visible = count_visible(grid, self.settings.pretraining.mask_ratio)
        parameters = sum(p.numel() for p in network.encoder.parameters())
        self.print_to_log_file(
            f"masking: {grid[0]}x{grid[1]}x{grid[2]} cells of {'x'.join(map(str, network.encoder.junction_stride))} "
            f"voxels, {visible} visible per crop; encoder {parameters:,} parameters; batch {self.batch_size} crops"
        )

    def _forward(self, batch: dict) -> torch.Tensor:
        image = batch["data"].to(self.device, non_blocking=True)
        visible = batch["visible"].to(self.device, non_blocking=True)
        with torch.autocast(self.device.type) if self.device.type == "cuda" else dummy_context():
            reconstruction = self.network(image, visible)
        return self.loss(image, reconstruction, visible)

    def on_train_epoch_start(self) -> None:
        """nnU-Net's; starts the meters."""
        super().on_train_epoch_start()
        self.step_in_epoch = 0
        self.epoch_started = perf_counter()
        self.dataloader_train.waited = 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def train_step(self, batch: dict) -> dict:
        """One step on a batch of crops and masks."""
        self.lr_scheduler.set_step(self.current_epoch * self.num_iterations_per_epoch + self.step_in_epoch)
        self.step_in_epoch += 1
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._forward(batch)
        norm = self.backward_and_step(loss, self.settings.pretraining.gradient_clip)
        return {"loss": loss.item(), "gradient_norm": norm}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Logs loss, gradient norm, speed, waiting and memory."""
        duration = perf_counter() - self.epoch_started
        world_size = dist.get_world_size() if self.is_ddp else 1
        values = {
            "train_losses": self._mean_over_processes([o["loss"] for o in train_outputs]),
            "gradient_norms": float(np.mean([o["gradient_norm"] for o in train_outputs])),
            "crops_per_second": len(train_outputs) * self.batch_size * world_size / duration,
            "waiting_for_data": self.dataloader_train.waited / duration,
            "peak_memory_gb": (
                torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else float("nan")
            ),
        }
        for key, value in values.items():
            self.logger.log(key, value, self.current_epoch)

    def _mean_over_processes(self, values: list[float]) -> float:
        mean = float(np.mean(values))
        if not self.is_ddp:
            return mean
        gathered: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(gathered, mean)
        return float(np.mean(gathered))

    def validation_step(self, batch: dict) -> dict:
        """Reconstruction loss of a fixed batch."""
        return {"loss": self._forward(batch).item()}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Logs the mean."""
        loss = self._mean_over_processes([o["loss"] for o in val_outputs])
        self.logger.log("val_losses", loss, self.current_epoch)

    def on_epoch_end(self) -> None:
        """Prints the epoch, keeps latest and best checkpoints (lowest validation loss), draws progress.png."""
        epoch = self.current_epoch
        self.logger.log("epoch_end_timestamps", time(), epoch)
        log = {key: self.logger.get_value(key, step=-1) for key in ("train_losses", "val_losses", "gradient_norms",
                                                                    "crops_per_second", "waiting_for_data")}
        started, ended = (self.logger.get_value(f"epoch_{when}_timestamps", step=-1) for when in ("start", "end"))
        self.print_to_log_file(f"train_loss {log['train_losses']:.4f}")
        self.print_to_log_file(f"val_loss {log['val_losses']:.4f}")
        self.print_to_log_file(
            f"gradient norm {log['gradient_norms']:.3g}, {log['crops_per_second']:.3g} crops/s, "
            f"{log['waiting_for_data']:.0%} of the time waiting for data"
        )
        self.print_to_log_file(f"Epoch time: {ended - started:.2f} s")
        if (epoch + 1) % self.save_every == 0 and epoch != self.num_epochs - 1:
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_latest.pth"))
        if self._best_ema is None or log["val_losses"] < self._best_ema:
            self._best_ema = log["val_losses"]
            self.print_to_log_file(f"New best validation loss: {self._best_ema:.4f}")
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_best.pth"))
        if self.local_rank == 0:
            self.logger.plot_progress_png(self.output_folder)
        self.current_epoch += 1

    def on_train_end(self) -> None:
        """nnU-Net's; ends the loaders."""
        super().on_train_end()
        for loader in (self.dataloader_train, self.dataloader_val):
            loader.close()

    def checkpoint_weights(self) -> dict[str, torch.Tensor]:
        """The pre-training network's weights, and a freshly initialised segmentation decoder under ``decoder.``, so
        that nnU-Net's own ``-pretrained_weights``, which wants every key of a network, accepts the file."""
        weights = dict(super().checkpoint_weights())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            segmentation = get_network_from_plans(
                self.configuration_manager.network_arch_class_name,
                self.configuration_manager.network_arch_init_kwargs,
                self.configuration_manager.network_arch_init_kwargs_req_import,
                self.num_input_channels,
                2,
            )
        fresh = segmentation.state_dict()
        weights.update({name: tensor for name, tensor in fresh.items() if name.startswith("decoder.")})
        return weights

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Reconstructs the held-out cases: ``validation/summary.json`` and a picture per case."""
        self.network.eval()
        _, cases = self.do_split()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if self.is_ddp else (0, 1)
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        options = self.settings.pretraining
        results = validate_cases(
            unwrap(self.network),
            [(name, find_image(self.preprocessed_dataset_folder, name)) for name in cases[rank::world_size]],
            as_size3(self.configuration_manager.patch_size),
            tuple(float(s) for s in self.configuration_manager.spacing),
            options.mask_ratio,
            options.seed,
            self.device,
            folder,
            self.print_to_log_file,
        )
        if self.is_ddp:
            gathered: list[list[dict]] = [[] for _ in range(world_size)]
            dist.all_gather_object(gathered, results)
            results = [r for part in gathered for r in part]
        if rank == 0:
            means = {key: float(np.mean([r[key] for r in results])) for key in ("loss", "masked_mae")}
            summary = {
                "metric_per_case": sorted(results, key=lambda r: r["case"]),
                "mean": means,
                "mask_ratio": options.mask_ratio,
                "units": {
                    "loss": "mean squared error on masked cells, in units of each cell's variance",
                    "masked_mae": "mean absolute error on masked voxels, preprocessed intensities, each cell's own "
                    "mean and deviation restored",
                },
            }
            (folder / "summary.json").write_text(json.dumps(summary, indent=2))
            self.print_to_log_file("Validation complete", also_print_to_console=True)
            self.print_to_log_file(f"Mean reconstruction loss: {means['loss']:.4f}", also_print_to_console=True)
