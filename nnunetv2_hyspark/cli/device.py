"""Where a command computes."""

from __future__ import annotations


def pick_device(name: str) -> str:
    """``cpu`` or ``cuda`` for what ``--device`` says; ``auto`` takes a GPU if there is one.

    Raises:
        ValueError: if ``cuda`` is asked for where torch finds no GPU.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    if name == "cuda" and not has_gpu:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ValueError(
            f"--device is cuda, but torch {torch.__version__} ({built}) finds no GPU; give --device cpu, or let "
            f"'hyspark doctor' say what is missing."
        )
    return name
