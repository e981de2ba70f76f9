"""Training that can stop after any step and go on with the next one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from time import monotonic, perf_counter
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..pretext.hyspark import HySparKConfig
from .checkpoints import BEST, LATEST, kept_name
from .distributed import world
from .epoch import EpochSoFar
from .incidents import NonFiniteGuard
from .trainer import HySparKTrainer


class ResumableTrainer(HySparKTrainer):
    """A trainer whose batches, masks and learning rates are functions of the step, so that its state is small.

    Subclasses say what the loss of a batch is (:meth:`compute_loss`) and make the loaders. All processes see the same
    loss, gradient norm and wish to stop, so they always do the same thing next.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.rank, self.world_size = world()
        self.so_far = EpochSoFar()
        self.asked_to_stop = False
        self.last_saved = monotonic()
        self.latest_is_due = False
        self.skipped_cases: set[str] = set()
        self.guard = NonFiniteGuard(self.folder / "incidents", self.options.max_bad_steps, self.print_to_log_file)

    @property
    def options(self) -> HySparKConfig:
        """Hyperparameters of this stage."""
        return self.settings.pretraining

    @property
    def step(self) -> int:
        """Optimizer steps done since the start of the training."""
        return self.current_epoch * self.num_iterations_per_epoch + self.so_far.step

    def compute_loss(self, image: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Loss of crops ``(B, C, D, H, W)`` with visible cells ``(B, g0, g1, g2)``, both on the device."""
        raise NotImplementedError

    def run_training(self) -> None:
        """nnU-Net's, with signals that stop it after a step.

        Raises:
            SystemExit: with status 128 + signal, after saving.
            RuntimeError: if the loss was not finite too often, or a data worker died.
        """
        with self.stop:
            self.on_train_start()
            while self.current_epoch < self.num_epochs:
                try:
                    self.run_epoch()
                except RuntimeError:
                    # the signal ended this process's workers, or another process, and the weights are those of the
                    # last whole step: an error of either kind comes before the update
                    if self.stop.received is not None:
                        self.save_and_leave(wait=False)
                    raise
            self.on_train_end()
            self.leave_after_training()

    def run_epoch(self) -> None:
        """An epoch, or what is left of it."""
        self.on_epoch_start()
        self.on_train_epoch_start()
        while self.so_far.step < self.num_iterations_per_epoch:
            self.train_step(self._timed_batch())
            self._save_or_leave()
        self.on_train_epoch_end([])
        with torch.no_grad():
            self.on_validation_epoch_start()
            outputs = []
            for _ in range(self.num_val_iterations_per_epoch):
                outputs.append(self.validation_step(self._next_batch(self.dataloader_val)))
                if self.asked_to_stop:
                    self.save_and_leave()
            self.on_validation_epoch_end(outputs)
        self.on_epoch_end()

    def _timed_batch(self) -> dict[str, Any]:
        self._clock = perf_counter()
        batch = self._next_batch(self.dataloader_train)
        self.so_far.waited += perf_counter() - self._clock
        return batch

    def _next_batch(self, loader: Iterator[dict[str, Any]]) -> dict[str, Any]:
        try:
            return next(loader)
        except (RuntimeError, ValueError):
            # nothing is wrong with the weights
            if self.stop.received is None and self.step:
                self.try_to_save(LATEST)
            raise

    def _save_or_leave(self) -> None:
        self.so_far.seconds += perf_counter() - self._clock
        if self.asked_to_stop:
            self.save_and_leave()
        if self.guard.exhausted:
            self._give_up()
        minutes = (monotonic() - self.last_saved) / 60
        if self.options.save_minutes and minutes >= self.options.save_minutes:
            self.try_to_save(LATEST)

    def _give_up(self) -> None:
        count = self.guard.in_a_row
        self.try_to_save(LATEST)
        raise RuntimeError(
            f"the loss was not finite in {count} steps in a row, the last one step {self.step - 1} in epoch "
            f"{self.current_epoch}; the weights from before are in {self.folder / LATEST}, the batches in "
            f"{self.guard.folder}; look at these cases, lower learning_rate, and go on with --c."
        )

    def try_to_save(self, name: str) -> None:
        """Writes a checkpoint; where that fails the run goes on, and the next epoch tries again."""
        try:
            self.save_checkpoint(str(self.folder / name))
            if name == LATEST:
                self.last_saved = monotonic()
                self.latest_is_due = False
        except OSError as error:
            self.latest_is_due = True
            self.print_to_log_file(f"WARNING: {error} The run goes on and tries again after the next epoch.")

    def save_epoch(self) -> None:
        """After an epoch: best (lowest validation loss), latest, and those that are kept for good."""
        epoch, loss = self.current_epoch + 1, self.logger.get_value("val_losses", step=-1)
        if math.isfinite(loss) and (self._best_ema is None or loss < self._best_ema):
            self._best_ema = loss
            self.print_to_log_file(f"New best validation loss: {loss:.4f}")
            self.try_to_save(BEST)
        if self.options.keep_every and epoch % self.options.keep_every == 0:
            self.try_to_save(kept_name(epoch))
        if (epoch % self.save_every == 0 or self.latest_is_due) and epoch != self.num_epochs:
            self.try_to_save(LATEST)

    def run_state(self) -> dict[str, Any]:
        """Epoch, and what has been measured in one that is not done."""
        return {**super().run_state(), "epoch_so_far": self.so_far.state() if self.epoch_is_open else None}

    def restore_run_state(self, checkpoint: dict[str, Any]) -> None:
        """Takes over what :meth:`run_state` wrote."""
        super().restore_run_state(checkpoint)
        self.so_far = EpochSoFar.restore(checkpoint.get("epoch_so_far"))

    def train_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One step on this process's share of a batch, in parts if so configured; skipped if the loss is not finite."""
        self._note_skipped_cases(batch)
        self.lr_scheduler.set_step(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward_in_parts(batch)
        norm = self.clip_gradients(self.options.gradient_clip)
        loss_value, norm_value = self._agree(loss, norm)
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            self.update_weights()
            self.guard.passed()
            self.so_far.losses.append(loss_value)
            self.so_far.gradient_norms.append(norm_value)
        elif math.isfinite(loss_value) and self.scale_may_fall():
            self.update_weights(skip=True)
        else:
            self.update_weights(skip=True)
            self.guard.report(batch, self.current_epoch, self.step, loss_value, self.rank)
        self.so_far.step += 1
        self.so_far.crops += self.configuration_manager.batch_size
        self.so_far.own_crops += len(batch["keys"])
        self.so_far.background += batch["background"]
        return {"loss": loss_value, "gradient_norm": norm_value}

    def validation_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """Loss of a fixed batch, in the parts of a training step."""
        total = torch.zeros((), device=self.device)
        for crops, cells in self.in_parts(batch):
            total += self.compute_loss(crops, cells) * (len(crops) / self.configuration_manager.batch_size)
        return {"loss": self._agree(total, torch.zeros_like(total))[0]}

    def to_device(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and visible cells of a batch."""
        return (
            batch["data"].to(self.device, non_blocking=True),
            batch["visible"].to(self.device, non_blocking=True),
        )

    def in_parts(self, batch: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Image and visible cells of a batch, on the device, cut as ``accumulate`` says.

        Processes have the same number of parts, also where their shares differ by a crop: norms over all processes
        meet once per part.
        """
        image, visible = self.to_device(batch)
        parts = min(self.options.accumulate, self.configuration_manager.batch_size // self.world_size)
        return list(zip(image.tensor_split(parts), visible.tensor_split(parts)))

    def _backward_in_parts(self, batch: dict[str, Any]) -> torch.Tensor:
        """Accumulates gradients; returns this process's part of the mean loss over the global batch."""
        parts = self.in_parts(batch)
        total = torch.zeros((), device=self.device)
        for number, (crops, cells) in enumerate(parts, 1):
            is_last = number == len(parts)
            network = self.network
            quiet = isinstance(network, DistributedDataParallel) and not is_last
            with network.no_sync() if quiet else nullcontext():
                loss = self.compute_loss(crops, cells) * (len(crops) / self.configuration_manager.batch_size)
                # DistributedDataParallel takes the mean over processes, but these are parts of a sum
                self.backward(loss * self.world_size)
            total += loss.detach()
        return total

    def _agree(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[float, float]:
        """Adds up the processes' parts of a loss, and asks whether any was told to stop; waits for the device."""
        stop = self.stop.received is not None
        if self.world_size == 1:
            self.asked_to_stop = stop
            loss_value, norm_value = torch.stack([loss, norm]).tolist()
            return loss_value, norm_value
        report = torch.stack([loss, norm / self.world_size, torch.full_like(loss, float(stop))])
        dist.all_reduce(report)
        loss_value, norm_value, stops = report.tolist()
        self.asked_to_stop = stops > 0
        return loss_value, norm_value

    def _note_skipped_cases(self, batch: dict[str, Any]) -> None:
        for sentence in batch["skipped"]:
            case = sentence.partition(":")[0]
            if case not in self.skipped_cases:
                self.skipped_cases.add(case)
                self.print_to_log_file(f"WARNING: another case is used instead of {sentence}")
