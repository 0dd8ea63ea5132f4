"""What is freed goes back, by the kernel's own count."""

import subprocess
import sys

import pytest

from src import cpu_memory
from src.config import PROJECT_FOLDER

HOLES = """
import psutil, torch
from src import cpu_memory
held = lambda: psutil.Process().memory_info().rss >> 20

def blocks():
    return [[torch.ones(1 << 18), torch.ones(1 << 10)] for _ in range(200)]  # a megabyte, and what stays behind it

torch.empty(1 << 22)  # glibc learns that blocks of 16 MB come and go, and keeps what is smaller
start = held()
with cpu_memory.for_weights():
    weights = blocks()
weights = [small for _, small in weights]
after_weights = held() - start
small = [small for _, small in blocks()]
kept = held() - start
cpu_memory.give_back()
print(after_weights, kept, held() - start)
"""


@pytest.mark.skipif(cpu_memory._LIBRARY is None, reason="another C library")
def test_pages_go_back_to_the_system() -> None:
    command = [sys.executable, "-c", HOLES]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=True)
    after_weights, kept, given_back = map(int, done.stdout.split())
    assert after_weights < 30
    assert kept > 150
    assert given_back < 30


def test_other_c_libraries_are_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(cpu_memory, "_LIBRARY", None)
    cpu_memory.give_back()
    with cpu_memory.for_weights():
        pass
    monkeypatch.setattr(sys, "platform", "win32")
    assert cpu_memory._c_library() is None
