"""The C++ kernels against torch in double precision; how they are compiled, kept, and done without."""

from __future__ import annotations

import copy
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from src import cpu_kernels, native

needs_native = pytest.mark.skipif(native._load()[0] is None, reason="needs a C++ compiler on x86-64 Linux")
HAS_BF16 = native._load()[0] is not None and bool(native._load()[0].knows_bf16()) and not native._HAS_AMX
PRECISIONS = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not HAS_BF16, reason="needs AVX512-BF16"))]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}  # relative, of the whole; bf16 has 8 bits


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(mine: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype, torchs: torch.Tensor | None = None) -> None:
    """Near the reference in double precision; where that is hard, no farther from it than twice what torch's own is."""
    assert (mine.shape, mine.dtype) == (reference.shape, dtype)
    allowed = TOLERANCE[dtype] * reference.norm()
    if torchs is not None:
        allowed += 2 * (torchs.double() - reference).norm()
    assert (mine.double() - reference).norm() <= allowed


@needs_native
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("width", [2, 8, 40, 64, 80, 96, 160, 256])
@pytest.mark.parametrize(("length", "others"), [(64, 64), (1, 1), (7, 77), (33, 31), (19, 1100)])
def test_attention_is_softmax_of_the_products(length: int, others: int, width: int, dtype: torch.dtype) -> None:
    sizes = (length, others, others)
    query, key, value = (2 * noise(2, size, 3, width, seed=i).to(dtype).transpose(1, 2) for i, size in enumerate(sizes))
    assert native.can_attend(query, key, value)
    reference = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    torchs = F.scaled_dot_product_attention(query, key, value)
    assert_close(native.attend(query, key, value), reference, dtype, torchs if dtype == torch.float32 else None)


@needs_native
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_attention_of_scores_far_apart(dtype: torch.dtype) -> None:
    """The highest score comes late, and is so high that all before count for nothing."""
    query, key, value = (noise(1, 1, 1200, 16, seed=i).to(dtype) for i in range(3))
    key[:, :, -3:] *= 60
    for parts in ((query, key, value), (-30 * query.abs(), key.abs(), value)):  # in the second all scores are far below 0
        reference = F.scaled_dot_product_attention(*(part.double() for part in parts))
        assert_close(native.attend(*parts), reference, dtype, F.scaled_dot_product_attention(*parts))


@needs_native
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(which: int, number: float, dtype: torch.dtype) -> None:
    parts = [noise(1, 1, 40, 16, seed=i).to(dtype) for i in range(3)]
    parts[which][0, 0, 3, 5] = number
    reference = F.scaled_dot_product_attention(*(part.double() for part in parts))
    assert not reference.isfinite().all() or which == 1  # a key that scores -inf weighs nothing
    assert torch.equal(native.attend(*parts).isfinite(), reference.isfinite())


@needs_native
def test_any_strides_are_read() -> None:
    storage = noise(2, 3, 50, 4, 24)
    query, key, value = storage.unbind(1)
    parts = query.transpose(1, 2), key.permute(0, 2, 1, 3), value.transpose(1, 2)
    reference = F.scaled_dot_product_attention(*(part.double() for part in parts))
    assert_close(native.attend(*parts), reference, torch.float32)
    one = noise(1, 1, 9, 24).expand(2, 4, 9, 24)  # all heads attend to one
    reference = F.scaled_dot_product_attention(parts[0].double(), one.double(), one.double())
    assert_close(native.attend(parts[0], one, one), reference, torch.float32)


@needs_native
def test_what_cannot_be_attended_is_said() -> None:
    part = noise(1, 2, 8, 16)
    assert native.can_attend(part, part, part)
    alike = [part.double(), part.half(), part.transpose(2, 3), part.to("meta"), part[0]]
    alike += [noise(1, 2, *sizes) for sizes in ((8, 15), (8, 258), (0, 16))]
    assert not any(native.can_attend(one, one, one) for one in alike)
    two = noise(2, 2, 8, 16)
    for query, key, value in (
        (part, part.double(), part), (two, part, part), (part, part, noise(1, 2, 7, 16)), (part, part, noise(1, 2, 8, 8)),
        (part, noise(1, 2, 8, 14), noise(1, 2, 8, 14)), (part, part[:, :1], part[:, :1]),
    ):  # fmt: skip
        assert not native.can_attend(query, key, value)


@needs_native
def test_scores_of_any_height_are_weighed() -> None:
    """What exceeds single precision's whole numbers, and what lies below any padding."""
    query, key, value = (noise(1, 2, size, 16, seed=size) for size in (9, 77, 77))
    for parts in ((1e5 * query, 1e5 * key, value), (torch.full_like(query, 1e16), torch.full_like(key, -1e15), value)):
        mine, reference = native.attend(*parts), F.scaled_dot_product_attention(*(part.double() for part in parts))
        torchs = F.scaled_dot_product_attention(*parts)
        assert mine.isfinite().all()
        assert_close(mine, reference, torch.float32, torchs)


@needs_native
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("with_silu", [False, True])
@pytest.mark.parametrize("given", ["nothing", "shift", "modulation", "both"])
@pytest.mark.parametrize(
    ("batch", "channels", "groups", "height", "width"),
    [(2, 32, 4, 9, 7), (1, 320, 32, 16, 16), (3, 16, 16, 1, 1), (1, 48, 1, 40, 33)],
)
def test_group_norm(
    batch: int, channels: int, groups: int, height: int, width: int, given: str, with_silu: bool, dtype: torch.dtype
) -> None:
    layer = torch.nn.GroupNorm(groups, channels, eps=1e-3).to(dtype).requires_grad_(False)
    layer.weight.copy_(noise(channels, seed=1))
    layer.bias.copy_(noise(channels, seed=2))
    x = (3 * noise(batch, channels, height, width) + 5).to(dtype).contiguous(memory_format=torch.channels_last)
    shift = noise(batch, channels, seed=3).to(dtype) if given in ("shift", "both") else None
    modulation = noise(batch, 2 * channels, seed=4).to(dtype) if given in ("modulation", "both") else None
    assert native.can_normalize(x, layer, shift, modulation)

    def plain(x: torch.Tensor, layer: torch.nn.GroupNorm) -> torch.Tensor:
        y = layer(x if shift is None else x + shift.to(x.dtype)[:, :, None, None])
        if modulation is not None:
            scale, after = modulation.to(x.dtype)[:, :, None, None].chunk(2, dim=1)
            y = y * (1 + scale) + after
        return F.silu(y) if with_silu else y

    mine = native.group_norm(x, layer, shift=shift, modulation=modulation, with_silu=with_silu)
    assert mine.is_contiguous(memory_format=torch.channels_last)
    assert_close(mine, plain(x.double(), copy.deepcopy(layer).double()), dtype, plain(x, layer))
    same = native.group_norm(x, layer, shift=shift, modulation=modulation, with_silu=with_silu, out=x)
    assert same is x
    assert torch.equal(same, mine)


@needs_native
def test_what_cannot_be_normalized_is_said() -> None:
    x, layer = noise(1, 32, 4, 4).contiguous(memory_format=torch.channels_last), torch.nn.GroupNorm(4, 32)
    assert native.can_normalize(x, layer)
    assert not native.can_normalize(x.contiguous(), layer)
    assert not native.can_normalize(x.double(), layer)
    assert not native.can_normalize(x, layer.bfloat16())
    assert not native.can_normalize(x, torch.nn.GroupNorm(4, 32, affine=False))
    assert not native.can_normalize(x, torch.nn.GroupNorm(4, 16))
    assert native.can_normalize(x, torch.nn.GroupNorm(4, 32), noise(1, 32))
    two = noise(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    assert not native.can_normalize(two, torch.nn.GroupNorm(4, 32), noise(1, 32))
    assert not native.can_normalize(x, torch.nn.GroupNorm(4, 32), noise(1, 32).bfloat16())
    assert not native.can_normalize(x, torch.nn.GroupNorm(4, 32), None, noise(1, 32))
    assert not native.can_normalize(noise(1, 24, 4, 4).contiguous(memory_format=torch.channels_last), torch.nn.GroupNorm(4, 24))


@needs_native
def test_any_number_of_threads_gives_the_same() -> None:
    parts, before = [noise(2, 3, 37, 40, seed=i) for i in range(3)], torch.get_num_threads()
    x, layer = noise(2, 32, 37, 5).contiguous(memory_format=torch.channels_last), torch.nn.GroupNorm(4, 32)
    one = native.attend(*parts), native.group_norm(x, layer)
    try:
        torch.set_num_threads(3)
        three = native.attend(*parts), native.group_norm(x, layer)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], three[0])
    assert (one[1] - three[1]).abs().max() < 1e-6


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """As at the start of a process, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._load.cache_clear()
    yield tmp_path
    native._load.cache_clear()


@needs_native
def test_it_is_compiled_once_and_linked_with_torchs_threads(unloaded: Path, monkeypatch) -> None:
    assert native.problem() is None
    (library,) = (unloaded / "cache" / "text-to-image").iterdir()
    openmp = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libgomp" in line]
    assert len(set(openmp)) == 1
    native._load.cache_clear()
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("compiled again"))
    assert native.problem() is None
    assert native.can_attend(*[noise(1, 1, 4, 4)] * 3)
    assert library.stat().st_size > 10_000


@needs_native
def test_a_damaged_library_is_compiled_anew(unloaded: Path, monkeypatch) -> None:
    assert native.problem() is None
    (library,) = (unloaded / "cache" / "text-to-image").iterdir()
    damaged = unloaded / "other" / "text-to-image" / library.name  # of a path that this process has not loaded
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(library.read_bytes()[:1000])
    monkeypatch.setenv("XDG_CACHE_HOME", str(unloaded / "other"))
    native._load.cache_clear()
    assert native.problem() is None
    assert damaged.read_bytes() == library.read_bytes()


def test_without_a_compiler_torch_draws_the_same(unloaded: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(unloaded))
    if native._is_offered(native._processor_features()):
        assert "no C++ compiler is installed" in native.problem()
    parts = [noise(1, 2, 8, 16, seed=i) for i in range(3)]
    assert not native.can_attend(*parts)
    assert torch.allclose(cpu_kernels.attend(*parts), F.scaled_dot_product_attention(*parts), atol=1e-5)


@needs_native
def test_a_compiler_that_fails_is_named_once_with_its_error(unloaded: Path, monkeypatch) -> None:
    broken = unloaded / "g++"
    broken.write_bytes(
        b"#!/bin/sh\nprintf 'native.cpp:1: warning: \\377\\nnative.cpp:2:3: error: no such thing\\n' >&2; exit 1\n"
    )
    broken.chmod(broken.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{unloaded}:/usr/bin:/bin")
    said = "did not compile the kernels (native.cpp:2:3: error: no such thing); torch's own draw, a little slower"
    assert native.problem() == f"{broken} {said}"
    native._load.cache_clear()
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("tried again"))
    assert f"{broken} could not compile the kernels when it was tried; delete " in native.problem()
    broken.unlink()  # another compiler is another matter
    native._load.cache_clear()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(unloaded / "cache"))
    assert native.problem() is None


@needs_native
@pytest.mark.parametrize(
    "error",
    [
        subprocess.TimeoutExpired(["g++"], 60, stderr=b"native.h: note: error-prone \xff"),
        subprocess.CalledProcessError(1, ["g++"], stderr="g++: fatal error: Killed signal terminated program cc1plus"),
        subprocess.CalledProcessError(1, ["g++"], stderr="/tmp/x.s: fatal error: No space left on device"),
    ],
    ids=["slow", "killed", "full disk"],
)
def test_what_passes_is_tried_again_at_the_next_start(unloaded: Path, monkeypatch, error: Exception) -> None:
    def fail(*arguments: object) -> Path:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(native, "_build", fail)
        assert "did not compile the kernels" in native.problem()
    native._load.cache_clear()
    assert native.problem() is None


@needs_native
def test_it_is_built_where_it_is_kept_for_elsewhere_nothing_may_be_run(unloaded: Path, monkeypatch) -> None:
    places = []
    monkeypatch.setattr(native, "_build", lambda *given, build=native._build: places.append(given[2]) or build(*given))
    assert native.problem() is None
    assert [place.parent for place in places] == [unloaded / "cache" / "text-to-image"]
    assert [path.suffix for path in (unloaded / "cache" / "text-to-image").iterdir()] == [".so"]


@needs_native
def test_what_others_could_have_written_is_not_run(unloaded: Path, monkeypatch) -> None:
    assert native.problem() is None
    folder = unloaded / "cache" / "text-to-image"
    (library,) = folder.iterdir()
    built = []
    monkeypatch.setattr(native, "_build", lambda *arguments, build=native._build: built.append(1) or build(*arguments))
    for path, mode in ((library, 0o666), (folder, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        native._load.cache_clear()
        assert native.problem() is None
        path.chmod(before)
    assert len(built) == 2


def test_a_user_without_a_home_and_a_relative_cache_are_no_obstacle(unloaded: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setattr(native.os.path, "expanduser", lambda path: path)
    assert native._cache_folder() is None
    assert native.problem() is None or "compiler" in native.problem()
    assert not Path("somewhere").exists()


@pytest.mark.parametrize("missing", ["_processor_features", "_threading_library"])
def test_what_nobody_can_change_is_not_said(missing: str, unloaded: Path, monkeypatch) -> None:
    monkeypatch.setattr(native, missing, lambda: "" if missing == "_processor_features" else None)
    assert native.problem() is None
    assert not native.can_attend(*[noise(1, 1, 4, 4)] * 3)


@needs_native
def test_a_cache_that_cannot_be_written_is_done_without(unloaded: Path, monkeypatch) -> None:
    (unloaded / "cache").write_text("a file")
    assert native.problem() is None
    assert native.can_attend(*[noise(1, 1, 4, 4)] * 3)


def test_it_can_be_switched_off() -> None:
    script = "from src import native; import torch; print(native.problem(), native.can_attend(*[torch.ones(1, 1, 4, 4)] * 3))"
    environment = {"SD_NATIVE": "0", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() == "None False"


@needs_native
def test_the_build_for_older_processors_computes_the_same(unloaded: Path, monkeypatch) -> None:
    """Eight lanes, no bf16."""
    monkeypatch.setattr(
        native, "OPTIONS", ("-mfma", *("-mavx2" if option == "-march=native" else option for option in native.OPTIONS))
    )
    assert native.problem() is None
    parts = [noise(2, 3, 75, 40, seed=i) for i in range(3)]
    assert_close(native.attend(*parts), F.scaled_dot_product_attention(*(part.double() for part in parts)), torch.float32)
    assert not native.can_attend(*(part.bfloat16() for part in parts))
    x, layer = noise(2, 32, 9, 5).contiguous(memory_format=torch.channels_last), torch.nn.GroupNorm(4, 32)
    assert_close(native.group_norm(x, layer, with_silu=True), F.silu(layer.double()(x.double())), torch.float32)
    parts[1][0, 0, 3] = float("nan")
    assert native.attend(*parts)[0, 0].isnan().all()
