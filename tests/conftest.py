"""Fixtures that every test may use."""
import os
from pathlib import Path

import pytest
from hypothesis import settings

from nnunetv2_hyspark import _startup

REPOSITORY = Path(__file__).resolve().parents[1]

# A slow or busy machine is no error.
settings.register_profile("hyspark", deadline=None)
settings.load_profile("hyspark")

_startup.install()  # so that tests also run from a checkout that is not installed


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images and golden values that lies beside the repository and is not part of it."""
    folder = Path(os.environ.get("HYSPARK_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"the shared data folder {folder} does not exist: set HYSPARK_SHARED to where it is")
    return folder
