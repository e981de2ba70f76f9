"""What a training leaves when it refuses pre-trained weights."""

from __future__ import annotations

from pathlib import Path

from ..transfer.report import LoadReport
from .trainer import HySparKTrainer

NAME = "refused_load_report.json"


def write_refusal(trainer: HySparKTrainer, report: LoadReport) -> None:
    """Writes what would have become of every tensor into the log, and to :data:`NAME` beside it.

    What an earlier run has left in the folder stays as it is.
    """
    trainer.print_to_log_file(report.table(), add_timestamp=False)
    if trainer.local_rank == 0:
        report.write_json(Path(trainer.output_folder) / NAME)
