"""What Windows does otherwise, played on any system: open files cannot be renamed, a backslash parts folders, cmd quotes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from src import files, memory_plan
from src.config import OptimizationConfig
from src.errors import ExitCode, UserError
from src.jobs import split_flags
from src.lora.writing import kohya_file_name
from src.prompts import decode_utf8
from src.terminal import shell_word
from src.training.interruption import Interruption


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The system calls itself Windows; returns what is waited for, in seconds."""
    waited: list[float] = []
    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setattr(files.time, "sleep", waited.append)
    return waited


def refusing(times: int):
    left = [times]

    def rename(source: str, target: str) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(13, "Access is denied")

    return rename


def test_a_rename_waits_for_who_looks_into_a_new_file(windows: list[float]) -> None:
    files.renamed(refusing(3), "a", "b")
    assert windows == [0.05, 0.1, 0.2]
    with pytest.raises(PermissionError):
        files.renamed(refusing(99), "a", "b")
    assert sum(windows[3:]) == pytest.approx(3.15)


def test_elsewhere_nobody_waits() -> None:
    with pytest.raises(PermissionError):
        files.renamed(refusing(1), "a", "b")


def test_a_backslash_in_a_job_file_parts_folders(windows: list[float]) -> None:
    line = r'--prompt "a (fox), it\'s red" --init-image C:\pics\new.png'.replace(r"\'", "'")
    assert split_flags(line) == ["--prompt", "a (fox), it's red", "--init-image", r"C:\pics\new.png"]


def test_elsewhere_a_job_file_is_split_as_a_shell_would() -> None:
    assert split_flags(r'--prompt "a \(b\)" --negative it\ is #1') == ["--prompt", r"a \(b\)", "--negative", "it is", "#1"]


def test_words_to_type_are_quoted_for_cmd(windows: list[float]) -> None:
    assert shell_word(r"models\lora\final") == r"models\lora\final"
    assert shell_word('a photo of "sks" dog') == r'"a photo of \"sks\" dog"'


def test_a_text_that_powershell_wrote_is_read() -> None:
    for encoding in ("utf-16-le", "utf-16-be"):
        assert decode_utf8("\ufeffa föx\r\n".encode(encoding), "jobs.txt") == "a föx\r\n"
    with pytest.raises(UserError, match="line 1 is not UTF-8"):
        decode_utf8(b"\xff\xfe\x00\xd8", "jobs.txt")  # half a surrogate pair


@pytest.mark.parametrize(
    ("name", "file"), [("con", "con_lora.safetensors"), ("Aux", "Aux_lora.safetensors"), ("dog", "dog.safetensors")]
)
def test_no_adapter_is_called_like_a_device(name: str, file: str, tmp_path: Path) -> None:
    assert kohya_file_name(name) == file
    assert files.safe_join(tmp_path, file).name == file


def test_a_long_name_of_wide_letters_is_cut_to_what_may_be_saved(tmp_path: Path) -> None:
    file = kohya_file_name("猫" * 60)
    assert files.safe_join(tmp_path, file).name == file == "猫" * 26 + ".safetensors"


def test_ctrl_break_is_ctrl_c(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    with Interruption() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested == signal.SIGUSR1
    assert stop.exit_code == ExitCode.INTERRUPTED


def test_compiling_without_a_compiler_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(memory_plan, "_has_compiler", lambda: False)
    with pytest.raises(UserError, match="--torch-compile needs"):
        memory_plan.check_switches(OptimizationConfig(enable_torch_compile=True))
    memory_plan.check_switches(OptimizationConfig())
