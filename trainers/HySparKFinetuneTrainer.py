"""Supervised training of the hybrid network, from pre-trained weights or from scratch."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_hyspark.heap import keep_freed_memory
from nnunetv2_hyspark.networks.segmentation import HySparKUNet
from nnunetv2_hyspark.training.checkpoints import BEST, FINAL, LATEST, checkpoints_in
from nnunetv2_hyspark.training.distributed import any_process, only_on_first
from nnunetv2_hyspark.training.finetuning import is_frozen, parameter_groups
from nnunetv2_hyspark.training.refused_load import write_refusal
from nnunetv2_hyspark.training.schedule import WarmupCosineSchedule
from nnunetv2_hyspark.training.trainer import HySparKTrainer, unwrap
from nnunetv2_hyspark.transfer.loading import load_pretrained_encoder


class HySparKFinetuneTrainer(HySparKTrainer):
    """Fine-tunes a pre-trained network: ``-pretrained_weights .../checkpoint_final.pth``, or the checkpoint that the
    plans remember (``hyspark plan-finetune``).

    AdamW with warm-up; nnU-Net's loss, deep supervision, augmentation, validation and prediction.
    """

    stage = "finetuning"
    needs_weights = True

    def initialize(self) -> None:
        """nnU-Net's; ``-pretrained_weights`` is handed to HySparK's loader by the start-up hook."""
        # nnU-Net gives the coarsest output no weight, which is the only one where the decoder has one stage
        if len(self.configuration_manager.network_arch_init_kwargs["strides"]) == 2:
            self.enable_deep_supervision = False
        super().initialize()
        self.bad_steps_in_a_row = 0
        self.step_in_epoch = 0
        self.latest_is_due = False
        self.best_stored = None
        self.draw_progress, self.logger.plot_progress_png = self.logger.plot_progress_png, self.try_to_draw_progress
        network = unwrap(self.network)
        if isinstance(network, HySparKUNet):
            self.hand_over_loader(network)
        self.first_weights = next(network.parameters()).detach().clone()

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """nnU-Net's; the one function of a trainer that ``nnUNetv2_predict`` calls, so memory is seen to here."""
        if not torch.cuda.is_available():
            keep_freed_memory()
        return HySparKTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )

    def load_pretrained(self, filename: str) -> None:
        """Loads the encoder of a checkpoint, and its decoder where that was trained, and reports what was loaded,
        adapted, left fresh and skipped: in the log, and as ``load_report.json`` beside it."""
        options = self.settings.finetuning
        report = load_pretrained_encoder(
            unwrap(self.network), filename, options.allow_partial, options.adapt_channels,
            functools.partial(write_refusal, self), options.load_decoder,
            masks=len(self.label_manager.foreground_labels) if self.is_cascaded else 0,
        )
        self.write_load_report(report)

    def load_remembered(self) -> None:
        """Loads the checkpoint that the plans remember, unless weights were loaded by ``-pretrained_weights``.

        Raises:
            FileNotFoundError, ValueError: if the file is gone, has changed, or does not fit.
        """
        remembered = self.settings.checkpoint
        now = next(unwrap(self.network).parameters())
        # without the start-up hook nnU-Net itself loads -pretrained_weights and tells nobody
        if remembered is None or self.weights_were_loaded or not torch.equal(now, self.first_weights):
            return
        remembered.check()
        self.print_to_log_file(f"The plans name the pre-trained checkpoint {remembered.path}")
        self.load_pretrained(remembered.path)

    def on_train_start(self) -> None:
        """nnU-Net's, after loading what the plans remember; a run that goes on has its weights already."""
        if not self.was_initialized:
            self.initialize()
        goes_on = self.was_resumed or (self.continue_training and bool(checkpoints_in(self.folder)))
        if self.needs_weights and not goes_on:
            if self.continue_training and not self.weights_were_loaded:
                self.load_again()
            self.load_remembered()
        super().on_train_start()
        if self.needs_weights and not goes_on and not self.weights_were_loaded:
            self.print_to_log_file(
                "NOTE: HySparK's loader was not asked for pre-trained weights. Without -pretrained_weights this run "
                "trains from scratch; HySparKScratchTrainer says so in its name."
            )

    def configure_optimizers(self):
        """AdamW with warm-up and cosine; see :class:`nnunetv2_hyspark.training.finetuning.FinetuningConfig`."""
        options = self.settings.finetuning
        groups = parameter_groups(unwrap(self.network), options)
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
        schedule = WarmupCosineSchedule(
            optimizer, options.learning_rate, self.num_epochs, options.warmup_epochs, self.num_iterations_per_epoch,
            options.frozen_epochs,
        )
        for group in groups:
            count = sum(p.numel() for p in group["params"])
            self.print_to_log_file(
                f"{group['name']}: {count:,} parameters, peak rate {options.learning_rate * group['lr_scale']:g}, "
                f"weight decay {group['weight_decay']:g}",
                add_timestamp=False,
            )
        return optimizer, schedule

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):  # nnU-Net's spelling
        """nnU-Net's, with the mirrored axes of the settings."""
        rotation, is_planewise, size, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        axes = tuple(axis for axis in axes if axis in self.settings.finetuning.mirror_axes)
        # nnU-Net's predictor takes None for no axis
        self.inference_allowed_mirroring_axes = axes or None
        return rotation, is_planewise, size, axes

    def on_train_epoch_start(self) -> None:
        """nnU-Net's; counts steps for the schedule and logs the decoder's rate."""
        self.network.train()
        self.step_in_epoch = 0
        self.freeze_encoder(self.encoder_is_frozen)
        self.lr_scheduler.step(self.current_epoch)
        rates = {group.get("name", "all"): group["lr"] for group in self.optimizer.param_groups}
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")
        self.print_to_log_file("Current learning rate:", ", ".join(f"{n} {r:.3g}" for n, r in rates.items()))
        self.logger.log("lrs", max(rates.values()), self.current_epoch)

    @property
    def encoder_is_frozen(self) -> bool:
        """In the present epoch."""
        return is_frozen(self.settings.finetuning, self.current_epoch)

    def freeze_encoder(self, frozen: bool) -> None:
        """Leaves the encoder out of backward pass, clipping and optimizer, or takes it in again."""
        if isinstance(self.network, DistributedDataParallel):
            # it waits in every step for the gradients of all parameters that were trained when it was made; so they
            # are computed, and dropped in backward()
            return
        encoder = unwrap(self.network).get_submodule("encoder")
        if any(parameter.requires_grad == frozen for parameter in encoder.parameters()):
            encoder.requires_grad_(not frozen)
            # what is compiled holds the backward pass of before
            torch._dynamo.reset()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass; a frozen encoder gets no gradients, so that it counts for nothing when they are clipped."""
        super().backward(loss)
        if self.encoder_is_frozen:
            for parameter in unwrap(self.network).get_submodule("encoder").parameters():
                parameter.grad = None

    def train_step(self, batch: dict) -> dict:
        """One step on a labelled batch."""
        self.lr_scheduler.set_step(self.current_epoch * self.num_iterations_per_epoch + self.step_in_epoch)
        self.step_in_epoch += 1
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        if isinstance(target, list):
            target = [t.to(self.device, non_blocking=True) for t in target]
        else:
            target = target.to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type) if self.device.type == "cuda" else dummy_context():
            loss = self.loss(self.network(data), target)
        skipped = self.backward_and_step(loss, batch)
        self.leave_if_asked()
        return {"loss": np.asarray(loss.detach().cpu()), "skipped": skipped}

    def backward_and_step(self, loss: torch.Tensor, batch: dict) -> bool:
        """One optimizer step, or none if the gradients are not finite; returns whether it was skipped for that.

        Overflow of half precision, which the gradient scaler mends, does not count. All processes have the same
        gradients, so they do the same.

        Raises:
            RuntimeError: after ``max_bad_steps`` steps in a row without finite gradients; the weights are saved.
        """
        options = self.settings.finetuning
        self.backward(loss)
        norm = float(self.clip_gradients(options.gradient_clip))
        if math.isfinite(norm):
            self.update_weights()
            self.bad_steps_in_a_row = 0
            return False
        loss_is_finite = not any_process(not bool(torch.isfinite(loss)), self.device)
        is_overflow = loss_is_finite and self.scale_may_fall()
        self.update_weights(skip=True)
        if is_overflow:
            return False
        self.bad_steps_in_a_row += 1
        cases = ", ".join(map(str, batch.get("keys", ())))
        self.print_to_log_file(
            f"WARNING: the gradients of step {self.step_in_epoch - 1} of this epoch are not finite (loss "
            f"{loss.item():.4g}, cases {cases}); the step is skipped."
        )
        if self.bad_steps_in_a_row >= options.max_bad_steps:
            only_on_first(lambda: self.save_checkpoint(str(self.folder / LATEST)))
            where = "" if self.disable_checkpointing else f" the weights from before are in {self.folder / LATEST};"
            raise RuntimeError(
                f"the gradients were not finite in {self.bad_steps_in_a_row} steps in a row, the last one step "
                f"{self.step_in_epoch - 1} of epoch {self.current_epoch} with cases {cases};{where} look at these "
                f"cases, lower learning_rate, and go on with --c."
            )
        return True

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's; a signal is heeded here too."""
        result = super().validation_step(batch)
        self.leave_if_asked()
        return result

    def save_checkpoint(self, filename: str) -> None:
        """Writes a checkpoint. Where the disk is full the run goes on, and tries again after the next epoch; only the
        final one, and the one with which a run leaves, must succeed.

        Raises:
            OSError: if one of these cannot be written; the previous one is untouched.
            RuntimeError: if weights are NaN or infinite; the previous one is untouched.
        """
        name = Path(filename).name
        try:
            super().save_checkpoint(filename)
        except OSError as error:
            if name == FINAL or self.must_save:
                raise
            self.latest_is_due = True
            if name == BEST:
                self._best_ema = self.best_stored
            self.print_to_log_file(f"WARNING: {error} The run goes on and tries again after the next epoch.")
            return
        if name == LATEST:
            self.latest_is_due = False
        if name == BEST:
            self.best_stored = self._best_ema

    def try_to_draw_progress(self, folder: str) -> None:
        """nnU-Net's ``progress.png``, which a full disk may prevent."""
        try:
            self.draw_progress(folder)
        except OSError as error:
            self.print_to_log_file(f"WARNING: progress.png was not written: {error}")

    @property
    def must_save(self) -> bool:
        """Whether the run is about to end."""
        return self.is_leaving or self.bad_steps_in_a_row >= self.settings.finetuning.max_bad_steps

    def run_state(self) -> dict[str, Any]:
        """How far the run is, with the steps of an epoch that is not done: its weights are further than those of the
        epoch's start, though it is repeated."""
        return {**super().run_state(), "epoch_so_far": {"step": self.step_in_epoch} if self.epoch_is_open else None}

    def restore_run_state(self, checkpoint: dict[str, Any]) -> None:
        """Takes over what :meth:`run_state` wrote, and which best checkpoint there is."""
        super().restore_run_state(checkpoint)
        self.best_stored = self._best_ema

    def on_epoch_end(self) -> None:
        """nnU-Net's; after a failed attempt every epoch saves."""
        every = self.save_every
        if self.latest_is_due:
            self.save_every = 1
        try:
            super().on_epoch_end()
        finally:
            self.save_every = every

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """nnU-Net's, with the mean loss of the steps that were not skipped."""
        skipped = sum(output["skipped"] for output in train_outputs)
        if skipped:
            self.print_to_log_file(f"{skipped} of {len(train_outputs)} steps were skipped")
        done = [output for output in train_outputs if not output["skipped"]] or train_outputs
        super().on_train_epoch_end([{"loss": output["loss"]} for output in done])


class HySparKScratchTrainer(HySparKFinetuneTrainer):
    """The same network and schedule without weights: the fair baseline."""

    needs_weights = False

    def load_pretrained(self, filename: str) -> None:
        """Refuses: this trainer is the baseline without pre-training."""
        raise ValueError(
            f"HySparKScratchTrainer trains from scratch, but -pretrained_weights {filename} was given; "
            f"use -tr HySparKFinetuneTrainer."
        )
