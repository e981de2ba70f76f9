"""Fixtures that every test may use."""
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from nnunetv2_hyspark import _startup
from nnunetv2_hyspark.cli.main import main
from nnunetv2_hyspark.precision import exact_float32

REPOSITORY = Path(__file__).resolve().parents[1]

# A slow or busy machine is no error.
settings.register_profile("hyspark", deadline=None)
settings.load_profile("hyspark")

if not torch.cuda.is_available():
    # Triton decides when it is first imported; our kernels then run on the CPU, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")

_startup.install()  # so that tests also run from a checkout that is not installed


@pytest.fixture(autouse=True)
def no_tf32():
    """What is compared on a GPU is the algorithm, not cuDNN's rounding."""
    with exact_float32():
        yield


@pytest.fixture
def point_nnunet_to(monkeypatch):
    """Tells nnU-Net in this process where a folder is: ``point_nnunet_to("nnUNet_raw", folder)``."""
    import nnunetv2.paths

    looks_when_asked = not isinstance(nnunetv2.paths.nnUNet_raw, str | None)

    def point(name: str, folder: Path) -> None:
        monkeypatch.setenv(name, str(folder))
        if looks_when_asked:
            return
        # nnU-Net 2.7 reads its variables once, and its modules keep what was read
        for module in [m for n, m in sys.modules.items() if n.split(".")[0].startswith(("nnunetv2", "hyspark"))]:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(folder))

    return point


@pytest.fixture(scope="session")
def golden(shared_data) -> dict:
    """The stored run of a small official HySparK; its mask without the channel axis."""
    path = shared_data / "golden" / "official_mini.pt"
    if not path.is_file():
        pytest.skip(f"{path} does not exist")
    stored = torch.load(path, weights_only=True)
    return {**stored, "active": stored["active"][:, 0]}


@pytest.fixture
def imported_official(golden, tmp_path, capsys) -> tuple[Path, str]:
    """The stored weights as an official training file through `hyspark import`: our file, and what was printed."""
    official, ours = tmp_path / "official.pth", tmp_path / "ours.pth"
    torch.save(golden["state_dict"], official)
    assert main(["import", str(official), "-o", str(ours)]) == 0
    return ours, capsys.readouterr().out


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images and golden values that lies beside the repository and is not part of it."""
    folder = Path(os.environ.get("HYSPARK_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"the shared data folder {folder} does not exist: set HYSPARK_SHARED to where it is")
    return folder
