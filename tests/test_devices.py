"""What the machine is asked, against a driver and files that say what is known."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from src import devices
from src.config import PROJECT_FOLDER
from src.devices import (
    Card,
    available_memory_bytes,
    cpu_has_bf16,
    cpu_vectors,
    detect_card,
    detect_cards,
    pick_device,
    pick_precision,
    total_memory_bytes,
)
from src.errors import ExitCode, UserError

NOT_FOUND = 6  # NVML_ERROR_NOT_FOUND


class Driver:
    """NVML's five calls as the C library makes them: results through pointers, errors as return codes."""

    def __init__(self, cards: list[tuple[str, int, int]], broken: str = "") -> None:
        self.cards = cards
        self.broken = broken
        self.opened = 0

    def _status(self, call: str) -> int:
        return NOT_FOUND if call == self.broken else 0

    def nvmlInit_v2(self) -> int:
        self.opened += 1 if self.broken != "init" else 0
        return self._status("init")

    def nvmlShutdown(self) -> int:
        self.opened -= 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle) -> int:
        if index.value >= len(self.cards):
            return NOT_FOUND
        handle._obj.value = index.value + 1
        return self._status("handle")

    def nvmlDeviceGetName(self, handle, name, size) -> int:
        assert size.value == len(name)
        name.value = self.cards[handle.value - 1][0].encode()
        return self._status("name")

    def nvmlDeviceGetMemoryInfo(self, handle, memory) -> int:
        assert ctypes.sizeof(memory._obj) == 24
        memory._obj.total, memory._obj.free = self.cards[handle.value - 1][1:]
        return self._status("memory")


def two_cards(broken: str = "") -> Driver:
    return Driver([("NVIDIA GeForce GTX 1650", 4 << 30, 3 << 30), ("NVIDIA A100", 80 << 30, 79 << 30)], broken)


@pytest.mark.parametrize(
    ("ordinal", "visible", "index"),
    [(0, None, 0), (1, None, 1), (0, "1", 1), (0, "1,0", 1), (1, "1,0", 0), (0, " 1 ", 1)],
)
def test_the_card_is_the_one_that_torch_would_take(monkeypatch, ordinal, visible, index):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = two_cards()
    assert detect_card(ordinal, driver, visible) == Card(*driver.cards[index], index)
    assert driver.opened == 0


@pytest.mark.parametrize(
    ("ordinal", "visible"),
    [(0, ""), (0, "-1"), (0, "-1,0"), (1, "0"), (2, None), (0, "7"), (0, "GPU-8932f937-d72c"), (1, "0,x,1")],
)
def test_a_card_that_torch_would_not_see_is_none(monkeypatch, ordinal, visible):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = two_cards()
    assert detect_card(ordinal, driver, visible) is None
    assert driver.opened == 0


def test_the_environment_chooses_the_card(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert detect_card(nvml=two_cards()).name == "NVIDIA A100"


def test_all_visible_cards_are_listed_in_order(monkeypatch):
    monkeypatch.setattr("src.devices.ctypes.CDLL", lambda name: two_cards())
    for visible, indices in {"0,1": [0, 1], "1,0": [1, 0], "1": [1], "": [], "7": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [card.index for card in detect_cards()] == indices


@pytest.mark.parametrize(
    ("name", "card_count", "has_mps", "expected"),
    [
        ("auto", 2, False, "cuda"), ("auto", 0, True, "mps"), ("auto", 0, False, "cpu"), ("cpu", 2, True, "cpu"),
        ("cuda", 1, False, "cuda"), ("cuda:1", 2, False, "cuda:1"), ("mps", 0, True, "mps"),
    ],
)  # fmt: skip
def test_a_device_that_is_there_is_taken(name, card_count, has_mps, expected):
    assert pick_device(name, card_count=card_count, has_mps=has_mps) == expected


@pytest.mark.parametrize(
    ("name", "card_count", "said"),
    [("cuda", 0, "torch is old"), ("cuda:1", 0, "torch is old"), ("cuda:2", 2, "cuda:0 to cuda:1"), ("mps", 2, "Macs")],
)
def test_a_device_that_is_not_there_is_refused(name, card_count, said):
    with pytest.raises(UserError, match=said) as raised:
        pick_device(name, card_count=card_count, has_mps=False, why_no_card="torch is old")
    assert raised.value.exit_code == ExitCode.USAGE


def test_precision_is_what_the_device_computes_in():
    picked = {(card, bf16): pick_precision("auto", on_card=card, cpu_bf16=bf16) for card in (0, 1) for bf16 in (0, 1)}
    assert picked == {(0, 0): "fp32", (0, 1): "bf16", (1, 0): "fp16", (1, 1): "fp16"}
    assert pick_precision("fp32", on_card=True, cpu_bf16=True) == "fp32"
    assert pick_precision("fp16", on_card=True, cpu_bf16=False) == "fp16"
    with pytest.raises(UserError, match="needs a graphics card") as raised:
        pick_precision("fp16", on_card=False, cpu_bf16=True)
    assert raised.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("broken", ["init", "handle", "name", "memory"])
def test_a_failing_driver_means_no_card_and_is_closed(broken):
    driver = two_cards(broken)
    assert detect_card(nvml=driver, visible="0") is None
    assert driver.opened == 0


def test_no_library_means_no_card(monkeypatch):
    monkeypatch.setattr("src.devices.NVML_LIBRARY", "libthere-is-no-such-driver.so.1")
    assert detect_card(visible="0") is None


def test_memory_is_read_in_bytes():
    text = "MemTotal:       16384000 kB\nMemFree:          100000 kB\nMemAvailable:    8192000 kB\nHugePages_Total:       0\n"
    assert total_memory_bytes(text) == 16_384_000 * 1024
    assert available_memory_bytes(text) == 8_192_000 * 1024


@pytest.mark.parametrize(
    ("files", "cgroup", "expected"),
    [
        ({"memory.max": "6000", "memory.current": "4000", "memory.stat": "anon 10\ninactive_file 500\n"}, "0::/", 2500),
        ({"memory.max": "max", "memory.current": "4000"}, "0::/", None),
        ({"user/a/memory.max": "900", "user/a/memory.current": "1000", "memory.max": "max"}, "0::/user/a", 0),
        ({"memory/memory.limit_in_bytes": "800", "memory/memory.usage_in_bytes": "300"}, "4:memory:/x", 500),
        ({}, "", None),
    ],
)
def test_a_container_has_what_its_limit_leaves(files, cgroup, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert devices._container_bytes(cgroup, tmp_path) == expected


def test_the_smaller_of_both_is_free(monkeypatch):
    monkeypatch.setattr(devices, "_container_bytes", lambda: 1000)
    assert available_memory_bytes() == 1000


def test_linux_within_windows_spills_as_windows_does(monkeypatch):
    for text, expected in (("5.15.153.1-microsoft-standard-WSL2\n", True), ("6.8.0-45-generic\n", False), ("", False)):
        monkeypatch.setattr(devices, "system_text", lambda path, text=text: text)
        assert devices.driver_spills() is expected


def test_without_meminfo_the_total_comes_from_the_system():
    assert available_memory_bytes("") is None
    assert total_memory_bytes("") == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux only")
def test_this_machine_answers_plausibly():
    assert 0 < available_memory_bytes() <= total_memory_bytes()


@pytest.mark.parametrize(
    ("flags", "has_bf16", "vectors"),
    [
        ("fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8", True, "AMX"),
        ("fpu avx2 avx512f avx512_bf16", True, "AVX512-BF16"),
        ("fpu sse2 avx2 avx512f", False, "AVX-512"),
        ("fpu sse2 avx avx2", False, "AVX2"),
        ("fpu avx512_bf16x no_amx_bf16", False, None),
        ("", False, None),
    ],
)
def test_what_a_cpu_multiplies_is_read_from_its_flags(flags, has_bf16, vectors):
    text = f"processor\t: 0\nmodel name\t: amx_bf16 in a name\nflags\t\t: {flags}\nbugs\t\t: none\n"
    assert (cpu_has_bf16(text), cpu_vectors(text)) == (has_bf16, vectors)
    assert cpu_vectors("processor\t: 0\nFeatures\t: fp asimd bf16\n") == "NEON"


def test_asking_imports_nothing_heavy():
    program = "import sys, src.devices as d; d.detect_card(); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=PROJECT_FOLDER, check=True)
