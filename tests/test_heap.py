"""What is freed stays in the process, unless the user has said otherwise."""
import ctypes
import os
import subprocess
import sys

import pytest

from nnunetv2_hyspark import heap

MEASURE = """
import resource, sys
import torch
from nnunetv2_hyspark.heap import keep_freed_memory

print(keep_freed_memory() if sys.argv[1] == "keep" else None)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(int(sys.argv[2]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(20):  # small blocks settle between the large ones
    faults()
print(max(faults() for _ in range(3)))
"""


def is_glibc() -> bool:
    """Whether malloc is glibc's, and no other one is loaded before it."""
    found = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    return found and not os.environ.get("LD_PRELOAD")


def measure(how: str, numbers: int, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if name not in heap.SET_BY_USERS}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, how, str(numbers)], capture_output=True, text=True, check=True,
        env={**clean, "GLIBC_TUNABLES": "", **environment},
    )
    said, faults = done.stdout.split()
    return said, int(faults)


@pytest.mark.skipif(not is_glibc(), reason="malloc is not glibc's")
def test_pages_are_cleared_once():
    """64 MB, more than malloc keeps by itself; a page is 4 kB, or more where the system makes them larger."""
    _, by_default = measure("leave", 2**24)
    told, kept = measure("keep", 2**24)
    assert told == "True"
    assert kept < 0.1 * by_default


@pytest.mark.skipif(not is_glibc(), reason="malloc is not glibc's")
@pytest.mark.parametrize("name", [*heap.SET_BY_USERS, "GLIBC_TUNABLES"])
def test_what_a_user_has_set_stays(name):
    value = "glibc.malloc.mmap_threshold=100000" if name == "GLIBC_TUNABLES" else "100000"
    told, _ = measure("keep", 2**10, **{name: value})
    assert told == "False"


@pytest.mark.parametrize("missing", ["gnu_get_libc_version", "mallopt"])
def test_other_systems_are_left_alone(monkeypatch, missing):
    for name in (*heap.SET_BY_USERS, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)

    class Library:
        def __getattr__(self, name):
            if name == missing:
                raise AttributeError(name)
            return lambda *_: 1

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: Library())
    assert heap.keep_freed_memory() is False


def test_a_release_that_takes_no_large_threshold_keeps_all(monkeypatch):
    for name in (*heap.SET_BY_USERS, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    calls = []

    class Library:
        gnu_get_libc_version = None

        class mallopt:
            argtypes = restype = None

            def __call__(self, name, value):
                calls.append((name, value))
                return int(name != heap.M_MMAP_THRESHOLD)

        mallopt = mallopt()

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: Library())
    assert heap.keep_freed_memory() is True
    assert calls == [(heap.M_MMAP_THRESHOLD, 2**30), (heap.M_MMAP_MAX, 0), (heap.M_TRIM_THRESHOLD, -1)]


GIVE_BACK = """
import torch
from nnunetv2_hyspark.heap import give_back_freed_memory, keep_freed_memory

def resident():
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("VmRSS:"))

keep_freed_memory()
before = resident()
torch.ones(2**26)
kept = resident() - before
give_back_freed_memory()
print(kept, resident() - before)
"""


@pytest.mark.skipif(not is_glibc(), reason="malloc is not glibc's")
def test_what_is_kept_can_be_given_back():
    """256 MB in kB."""
    done = subprocess.run([sys.executable, "-c", GIVE_BACK], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 200_000 and left < 50_000


def test_nothing_is_given_back_elsewhere(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    heap.give_back_freed_memory()
