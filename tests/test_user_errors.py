"""Uncaught errors of the user's become one line; everything else keeps its traceback."""
import os
import subprocess
import sys

import pytest

START = "from nnunetv2_hyspark.user_errors import show_user_errors_as_sentences as show; show(); show()\n"
MISTAKE = "from nnunetv2_hyspark.geometry import divide; divide((5, 4, 4), (2, 2, 2), 'patch size')"


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_a_mistake_is_one_line_and_still_fails():
    done = run(MISTAKE)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert "patch size (5, 4, 4) is not divisible by (2, 2, 2)" in lines[0]


OURS = "exec(compile({code!r}, 'ours.py', 'exec'), {{'__name__': 'nnunetv2_hyspark.ours'}})"


@pytest.mark.parametrize("error", ["ValueError", "OSError", "FileNotFoundError", "RuntimeError"])
def test_types_that_say_what_to_do(error):
    done = run(OURS.format(code=f"raise {error}('do this')"))
    assert done.returncode == 1
    assert done.stderr.startswith("nnunetv2_hyspark: error: do this") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("error", ["NotImplementedError", "RecursionError", "KeyError", "TypeError"])
def test_defects_of_our_own_keep_their_traceback(error):
    assert "Traceback" in run(OURS.format(code=f"raise {error}('oops')")).stderr


def test_training_without_a_gpu_ends_in_a_line(tmp_path):
    """The module runs as __main__, and this error comes before any trainer."""
    folders = {f"nnUNet_{name}": str(tmp_path) for name in ("raw", "preprocessed", "results")}
    done = subprocess.run(
        [sys.executable, "-m", "nnunetv2_hyspark.train", "900", "3d_fullres", "0"],
        capture_output=True, text=True, env={**os.environ, **folders, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1
    assert "nnunetv2_hyspark: error: no GPU is visible to torch; give -device cpu" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_traceback_is_there_on_request():
    assert "Traceback" in run(MISTAKE, nnUNet_hyspark_traceback="1").stderr


@pytest.mark.parametrize(
    "code",
    [
        "int('four')",  # a ValueError of somebody else's
        "from nnunetv2_hyspark.geometry import divide; divide(None, None)",  # a defect
        "from nnunetv2_hyspark.geometry import as_size3; as_size3('abc')",  # raised inside our code, not by it
        "raise RuntimeError('CUDA error')",  # a RuntimeError of somebody else's
    ],
)
def test_surprises_keep_their_traceback(code):
    done = run(code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
