"""Journals, folders that can be written to, names that stay inside, and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from src import files
from src.errors import ExitCode, UserError
from tests.tiny.faults import POSIX, assert_one_line, fail_from, in_child, seconds

# --- append_line


def test_append_line_starts_afresh_after_a_torn_line(tmp_path):
    journal = tmp_path / "journal.jsonl"
    files.append_line(journal, '{"a": 1}')
    with journal.open("ab") as file:
        file.write(b'{"torn": ')
    files.append_line(journal, '{"ü": 2}')
    files.append_line(journal, '{"c": 3}')
    assert journal.read_bytes().decode().split("\n") == ['{"a": 1}', '{"torn": ', '{"ü": 2}', '{"c": 3}', ""]


def test_append_line_takes_one_line(tmp_path):
    for text in ("a\nb", "a\r"):
        with pytest.raises(ValueError, match="one line"):
            files.append_line(tmp_path / "journal", text)


def test_append_line_flushes_and_reports(tmp_path, monkeypatch):
    journal = tmp_path / "journal"
    with monkeypatch.context() as patch:
        fail_from(patch, "fsync", 1, errno.EIO)
        with pytest.raises(UserError) as caught:
            files.append_line(journal, "x")
    assert_one_line(caught.value, str(journal), os.strerror(errno.EIO))


# --- check_writable_folder


def test_check_writable_folder_makes_it_and_leaves_it_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    assert files.check_writable_folder(folder) == folder
    assert files.check_writable_folder(folder) == folder
    assert os.listdir(folder) == []


def assert_not_writable(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        files.check_writable_folder(path)
    assert caught.value.exit_code == ExitCode.USAGE
    assert_one_line(caught.value, str(path))


@POSIX
def test_check_writable_folder_refuses_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to("missing")
    for name in ("file", "file/below", "nowhere", "a\0b"):
        assert_not_writable(tmp_path / name)


def test_check_writable_folder_tries_a_write(tmp_path, monkeypatch):
    fail_from(monkeypatch, "write", 1, errno.ENOSPC)
    assert_not_writable(tmp_path)
    assert os.listdir(tmp_path) == []


@POSIX
def test_check_writable_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    tmp_path.chmod(0o755)

    def check():
        os.chdir(tmp_path)  # a child without root's rights cannot come here by the full path
        if os.geteuid() == 0:
            os.setuid(65534)
        assert_not_writable(Path("locked"))
        assert_not_writable(Path("locked/below"))

    assert in_child(check) == 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_check_writable_folder_is_not_fooled_by_root():
    assert_not_writable(Path("/proc/self"))  # mode bits say yes to root
    assert_not_writable(Path("/proc/pictures"))


# --- safe_join

UNSAFE = [
    *("", ".", "..", "../a", "a/../b", "a/..", "./a", "a//b", "a/", "/", "/etc/passwd", "//server/share"),
    *("C:", "C:a", "C:/a", "c:\\a", "\\\\server\\share", "\\\\?\\C:\\a", "..\\a", "a\\b", "a\\..\\..\\b"),
    *("a\0b", "a\nb", "a\x1b[2Jb", "a\x7f", "a\x85", "a\u202eb", "a\u200bb", "\ud800", "a\ud83d"),
    *("CON", "con", "nul", "NUL.txt", "aux.tar.gz", "a/PRN", "a/prn/b", "COM1", "lpt9.png", "COM¹", "CONIN$", "con .txt"),
    *("a.", "a ", "a./b", "a /b", "...", " ", "a:stream", "a*", "a?", 'a"', "a<b", "a>b", "a|b"),
    *("x" * 121, "ü" * 61, "a/" * 60 + "b"),
]
SAFE = ["a", "a.png", ".hidden", "a/b/c.txt", "Ünïcode 你好.png", "console", "com10", "nulls.txt", "a b", "~", "x" * 120]


@pytest.mark.parametrize("name", UNSAFE)
def test_safe_join_refuses(tmp_path, name):
    with pytest.raises(UserError) as caught:
        files.safe_join(tmp_path, name)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert_one_line(caught.value, "is not a safe name")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", SAFE)
def test_safe_join_accepts(tmp_path, name):
    assert files.safe_join(tmp_path, name) == Path(os.path.realpath(tmp_path)) / name


@POSIX
def test_safe_join_follows_links_before_it_decides(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "root-not"  # a prefix of the text, but another folder
    root.mkdir(), outside.mkdir()
    (root / "out").symlink_to(outside)
    (root / "file").symlink_to("/etc/passwd")
    (root / "here").symlink_to(".")
    (root / "loop").symlink_to("loop")
    for name in ("out", "out/a", "file", "here"):
        with pytest.raises(UserError, match="leads out"):
            files.safe_join(root, name)
    assert files.safe_join(root, "here/a") == root / "a"
    assert files.safe_join(root, "loop").is_relative_to(root)


def test_safe_join_on_random_names(tmp_path):
    pieces = ["..", ".", "/", "\\", "a", "b.png", " ", ":", "C:", "CON", "\0", "\n", "~", "ü", "//", "\u202e"]
    dice = random.Random(0)
    accepted = 0
    for _ in range(5000):
        name = "".join(dice.choices(pieces, k=dice.randint(1, 6)))
        try:
            path = files.safe_join(tmp_path, name)
        except UserError:
            continue
        accepted += 1
        assert os.path.commonpath([os.path.realpath(tmp_path), os.path.normpath(tmp_path / name), path]) == str(tmp_path)
        assert path != tmp_path
    assert accepted > 50


# --- require_file and sha256_of


@POSIX
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    assert files.require_file(tmp_path / "link").st_size == 1
    cases = {
        tmp_path / "pipe": ExitCode.REFUSED,
        tmp_path: ExitCode.REFUSED,
        Path("/dev/zero"): ExitCode.REFUSED,
        Path("a\0b"): ExitCode.REFUSED,
        tmp_path / "missing": ExitCode.NOT_FOUND,
        tmp_path / "file" / "below": ExitCode.NOT_FOUND,
    }
    for path, code in cases.items():
        with seconds(5), pytest.raises(UserError) as caught:
            files.sha256_of(path)
        assert caught.value.exit_code == code
        assert_one_line(caught.value)


def made_long_ago(path: Path, data: bytes, age_s: int = 100) -> Path:
    path.write_bytes(data)
    os.utime(path, (1_700_000_000 - age_s,) * 2)
    return path


def test_sha256_of_equals_the_hash_of_the_bytes(tmp_path):
    for data in (b"", b"abc", os.urandom(3_000_001)):
        path = made_long_ago(tmp_path / "a", data)
        assert files.sha256_of(path) == hashlib.sha256(data).hexdigest()


def test_the_hash_cache_spares_the_reading_until_the_file_changes(tmp_path):
    cache, path = tmp_path / "hashes.json", made_long_ago(tmp_path / "model", b"first")
    first = files.sha256_of(path, cache)
    made_long_ago(path, b"other")  # same size and time: only a hash that was not computed again is the first one
    assert files.sha256_of(path, cache) == first
    made_long_ago(path, b"other", age_s=99)
    assert files.sha256_of(path, cache) == hashlib.sha256(b"other").hexdigest()
    other = made_long_ago(tmp_path / "model2", b"2")
    files.sha256_of(other, cache)
    assert len(json.loads(cache.read_bytes())) == 2


def test_a_file_of_this_moment_is_not_remembered(tmp_path):
    path, cache = tmp_path / "model", tmp_path / "hashes.json"
    path.write_bytes(b"first")
    files.sha256_of(path, cache)
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"[]", b'{"%s": 1}', b'{"%s": [5, 1, 2]}', b'{"%s": []}', b"[" * 100_000])
def test_a_damaged_hash_cache_is_replaced(tmp_path, damage):
    path, cache = made_long_ago(tmp_path / "model", b"first"), tmp_path / "hashes.json"
    cache.write_bytes(damage.replace(b"%s", str(path).encode()))
    assert files.sha256_of(path, cache) == hashlib.sha256(b"first").hexdigest()
    assert json.loads(cache.read_bytes())[os.path.realpath(path)][2] == hashlib.sha256(b"first").hexdigest()


def test_a_hash_cache_that_cannot_be_written_costs_nothing_else(tmp_path):
    path = made_long_ago(tmp_path / "model", b"first")
    assert files.sha256_of(path, tmp_path / "missing" / "hashes.json") == hashlib.sha256(b"first").hexdigest()


@POSIX
def test_a_hugging_face_blob_answers_by_its_name(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev" / "unet"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    for name in ("ab" * 32, "ab" * 20):  # sha256 of a large file; git's sha1 of a small one
        (blobs / name).write_bytes(b"content")
        (snapshot / f"{len(name)}.bin").symlink_to(f"../../../blobs/{name}")
    assert files.sha256_of(snapshot / "64.bin") == "ab" * 32
    assert files.sha256_of(snapshot / "40.bin") == hashlib.sha256(b"content").hexdigest()
