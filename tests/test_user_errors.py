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


def test_the_traceback_is_there_on_request():
    assert "Traceback" in run(MISTAKE, nnUNet_hyspark_traceback="1").stderr


@pytest.mark.parametrize(
    "code",
    [
        "int('four')",  # a ValueError of somebody else's
        "from nnunetv2_hyspark.geometry import divide; divide(None, None)",  # a defect
        "from nnunetv2_hyspark.geometry import as_size3; as_size3('abc')",  # raised inside our code, not by it
    ],
)
def test_surprises_keep_their_traceback(code):
    done = run(code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
