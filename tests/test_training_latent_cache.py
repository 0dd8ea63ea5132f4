"""Cached latents against the VAE called by hand; what makes a new entry; what is never used."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from src import diffusion
from src.dataset import Example, load_picture, read_dataset
from src.errors import UserError
from src.training.latent_cache import LatentCache
from tests.tiny import pipelines


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return pipelines.vae()


@pytest.fixture
def examples(tmp_path: Path) -> tuple[Example, ...]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size in {"a": (64, 64), "b": (150, 70), "c": (64, 90)}.items():
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    return read_dataset(folder, 64, step_px=16, buckets=True, validation_every=0).train


class Watched:
    """A cache whose encodings are counted and whose words are kept."""

    def __init__(self, vae: AutoencoderKL, folder: Path, **changes: object) -> None:
        self.said: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.cache = LatentCache(vae, folder / "cache", **{"vae_id": "abc", "device": "cpu", "say": self.said.append} | changes)

    def encode(self, examples: tuple[Example, ...], flip: bool = False, unmirrored: tuple[Example, ...] = ()) -> int:
        """How many pictures the VAE encoded."""
        self.progress = []
        self.cache.encode(examples, flip, lambda *numbers: self.progress.append(numbers), unmirrored)
        return self.progress[-1][0] - self.progress[0][0]


def by_hand(vae: AutoencoderKL, example: Example, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = VaeImageProcessor().preprocess(load_picture(example, flip))
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    shift = torch.tensor(vae.config.latents_mean or [0.0] * 4).view(1, 4, 1, 1)
    scale = vae.config.scaling_factor / torch.tensor(vae.config.latents_std or [1.0] * 4).view(1, 4, 1, 1)
    return ((posterior.mean - shift) * scale)[0], (posterior.std * scale)[0]


@pytest.mark.parametrize("with_statistics", [False, True])
def test_latents_are_the_vaes_mean_and_deviation(tmp_path: Path, examples, with_statistics: bool) -> None:
    vae = pipelines.vae()
    if with_statistics:  # as the SDXL VAE of Playground 2.5 has them
        vae.register_to_config(latents_mean=[-1.6, 0.3, 0.1, 2.0], latents_std=[8.0, 6.0, 5.0, 4.0], scaling_factor=0.5)
    watched = Watched(vae, tmp_path)
    assert watched.encode(examples, flip=True) == 6
    assert watched.progress == [(done, 6) for done in range(7)]
    fresh = Watched(vae, tmp_path).cache  # reads the disk
    for example in examples:
        for flip in (False, True):
            mean, std = by_hand(vae, example, flip)
            for cache in (watched.cache, fresh):
                latents = cache.get(example, flip)
                torch.testing.assert_close(latents.mean, mean)
                torch.testing.assert_close(latents.std, std)
                assert latents.mean.dtype == latents.std.dtype == torch.float32
                assert latents.mean.shape == (4, example.size_px[1] // 8, example.size_px[0] // 8)
    assert watched.said == []


def test_a_full_disk_is_refused_before_anything_is_encoded(tmp_path: Path, vae, examples, monkeypatch) -> None:
    """Mean and deviation of 4 channels in 4 bytes at each eighth pixel, of each picture and its mirror image."""
    mirrored, unmirrored = examples[:2], examples[2:]
    pictures = [*mirrored, *mirrored, *unmirrored]
    needed = sum(2 * 4 * 4 * (item.size_px[0] // 8) * (item.size_px[1] // 8) for item in pictures)
    watched = Watched(vae, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (2**30, 2**30, needed - 1))
    with pytest.raises(UserError, match=f"{needed:,} bytes are needed"):
        watched.encode(mirrored, flip=True, unmirrored=unmirrored)
    assert watched.progress == [(0, 5)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (2**30, 2**30, needed))
    assert watched.encode(mirrored, flip=True, unmirrored=unmirrored) == 5
    assert watched.cache.get(unmirrored[0])
    with pytest.raises(UserError, match="latents are gone"):
        watched.cache.get(unmirrored[0], flip=True)


def test_a_sample_is_the_vaes_own_with_the_same_noise(tmp_path: Path, vae, examples) -> None:
    """Drawn by diffusers from 500 generators, and by us from 500 keys: the same mean and deviation."""
    watched = Watched(vae, tmp_path)
    watched.encode(examples)
    latents = watched.cache.get(examples[0])
    drawn = torch.stack([diffusion.draw_latents(key, latents.mean, latents.std) for key in range(500)])
    torch.testing.assert_close(drawn.mean(0), latents.mean, atol=5 * latents.std.max().item() / 500**0.5, rtol=0)
    assert ((drawn - latents.mean) / latents.std).std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(diffusion.draw_latents(7, latents.mean, latents.std), drawn[7])


def test_nothing_is_encoded_twice(tmp_path: Path, vae, examples) -> None:
    assert Watched(vae, tmp_path).encode(examples) == 3
    again = Watched(vae, tmp_path)
    assert again.encode(examples) == 0
    assert again.progress == [(3, 3)]
    assert again.encode(examples, flip=True) == 3


def test_whatever_changes_the_latents_makes_a_new_entry(tmp_path: Path, vae, examples) -> None:
    Watched(vae, tmp_path).encode(examples)
    folder = examples[0].path.parent

    def read(resolution_px: int = 64, step_px: int = 16) -> tuple[Example, ...]:
        return read_dataset(folder, resolution_px, step_px=step_px, buckets=True, validation_every=0).train

    assert Watched(vae, tmp_path).encode(read()) == 0
    assert Watched(vae, tmp_path, vae_id="abd").encode(read()) == 3
    assert Watched(vae, tmp_path).encode(read(128)) == 3
    assert Watched(vae, tmp_path).encode(read(step_px=64)) == 2  # other cuts of all that are no squares
    rescaled = pipelines.vae()
    rescaled.register_to_config(scaling_factor=0.5)
    assert Watched(rescaled, tmp_path).encode(read()) == 3
    assert Watched(pipelines.vae().to(torch.bfloat16), tmp_path).encode(read()) == 3
    file = folder / "a.png"  # one byte behind the picture's end: the same pixels, but who knows
    file.write_bytes(file.read_bytes() + b"\0")
    assert Watched(vae, tmp_path).encode(read()) == 1
    (folder / "b.txt").write_text("another caption")
    assert Watched(vae, tmp_path).encode(read()) == 0
    file.rename(folder / "z.png")
    (folder / "a.txt").rename(folder / "z.txt")
    assert Watched(vae, tmp_path).encode(read()) == 0


def test_a_damaged_file_is_said_and_encoded_again(tmp_path: Path, vae, examples) -> None:
    Watched(vae, tmp_path).encode(examples)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    before = {file: file.read_bytes() for file in files}
    files[0].write_bytes(before[files[0]][:-7])
    again = Watched(vae, tmp_path)
    assert again.encode(examples) == 1
    assert len(again.said) == 1
    assert {file: file.read_bytes() for file in files} == before


def test_a_file_that_broke_while_training_ends_in_one_line(tmp_path: Path, vae, examples) -> None:
    Watched(vae, tmp_path).encode(examples)
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="--resume"):
        Watched(vae, tmp_path).cache.get(examples[0])


class OverflowingVae(AutoencoderKL):
    """Overflows in half precision, as SDXL's does."""

    always = False

    def encode(self, x: torch.Tensor, return_dict: bool = True):
        posterior = super().encode(x.float() if self.dtype == torch.float32 else x, return_dict)
        if self.always or self.dtype == torch.bfloat16:
            posterior.latent_dist.mean[:, 0, 0, 0] = float("nan")
        return posterior


def overflowing() -> OverflowingVae:
    return OverflowingVae.from_config(pipelines.vae().config).eval()


def test_a_vae_that_overflows_encodes_all_in_fp32(tmp_path: Path, examples) -> None:
    torch.manual_seed(0)
    vae = overflowing()
    state = {name: tensor.bfloat16().float() for name, tensor in vae.state_dict().items()}
    vae.load_state_dict(state)
    expected = by_hand(vae, examples[1], False)
    watched = Watched(vae.to(torch.bfloat16), tmp_path)
    watched.encode(examples)
    assert len(watched.said) == 1
    assert "bfloat16" in watched.said[0]
    assert "fp32" in watched.said[0]
    assert str(examples[0].path) not in watched.said[0]
    torch.testing.assert_close(watched.cache.get(examples[1]).mean, expected[0])
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3  # none of them with NaN
    in_fp32 = Watched(overflowing(), tmp_path)
    assert in_fp32.encode(examples) == 0  # the same entries


def test_pictures_encoded_before_the_overflow_are_encoded_again(tmp_path: Path, examples) -> None:
    """All of a data set in one precision: the latents of one do not depend on which others are there."""
    vae = overflowing()
    vae.to(torch.bfloat16)
    watched = Watched(vae, tmp_path)
    OverflowingVae.encode, original = AutoencoderKL.encode, OverflowingVae.encode
    try:
        watched.encode(examples[:1])
    finally:
        OverflowingVae.encode = original
    watched.encode(examples[1:])
    assert vae.dtype == torch.float32
    torch.testing.assert_close(watched.cache.get(examples[0]).mean, by_hand(vae, examples[0], False)[0])


def test_a_vae_without_numbers_is_named_and_never_the_picture(tmp_path: Path, examples) -> None:
    vae = overflowing()
    vae.always = True
    with pytest.raises(UserError, match="VAE") as caught:
        Watched(vae, tmp_path).encode(examples)
    assert str(examples[0].path) not in str(caught.value)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_a_damaged_or_vanished_picture_is_named(tmp_path: Path, vae, examples) -> None:
    data = examples[1].path.read_bytes()
    examples[1].path.write_bytes(data[:-200])
    with pytest.raises(UserError, match=r"b\.png.*prepare_dataset"):
        Watched(vae, tmp_path).encode(examples)
    examples[1].path.unlink()
    with pytest.raises(UserError, match=r"b\.png"):
        Watched(vae, tmp_path).encode(examples)
    Image.new("RGB", (150, 70)).save(examples[1].path)
    with pytest.raises(UserError, match=r"b\.png: was changed"):
        Watched(vae, tmp_path).encode(examples)
    examples[1].path.write_bytes(data)
    assert Watched(vae, tmp_path).encode(examples) == 2  # the first stands on disk already


def test_pictures_are_read_ahead_but_never_all(tmp_path: Path, vae, examples, monkeypatch: pytest.MonkeyPatch) -> None:
    from src.training import latent_cache

    waiting: list[int] = []
    loaded = 0

    def load(example: Example, flip: bool) -> Image.Image:
        nonlocal loaded
        loaded += 1
        return load_picture(example, flip)

    def encoded(done: int, total: int) -> None:
        waiting.append(loaded - done)

    monkeypatch.setattr(latent_cache, "load_picture", load)
    monkeypatch.setattr(latent_cache.os, "cpu_count", lambda: 2)
    cache = LatentCache(vae, tmp_path / "cache", vae_id="abc", device="cpu", say=print)
    many = [Example(examples[0].path, ("",), (64 + 8 * index, 64), (64, 64), (0, 0), examples[0].sha256) for index in range(30)]
    cache.encode(many, False, encoded)
    assert loaded == 30
    assert 1 < max(waiting) <= 5


def test_the_vae_is_back_where_it_was(tmp_path: Path, examples, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = pipelines.vae()
    moves: list[object] = []
    move = vae.to
    monkeypatch.setattr(vae, "to", lambda target: (moves.append(target), move(target))[1])
    Watched(vae, tmp_path).encode(examples)
    assert moves == [torch.device("cpu")] * 2
    Watched(vae, tmp_path).encode(examples)
    assert len(moves) == 2  # nothing to encode: it stays away from the device
