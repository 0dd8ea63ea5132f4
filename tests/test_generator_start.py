"""A picture or mask that is given from Python counts as its file does."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from src.generator import TextToImageGenerator
from tests.test_generator import PROMPT, SEED, config_for, gradient
from tests.tiny import pipelines


def test_a_layer_with_transparency_and_a_photo_on_its_side_are_read_as_from_their_files(tmp_path: Path) -> None:
    generator = TextToImageGenerator(config_for(pipelines.save(pipelines.sd1(), tmp_path / "tiny"), tmp_path))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    gradient(64, 64).save(tmp_path / "photo.png", exif=exif)
    layer = Image.new("RGBA", (64, 64), (255, 255, 255, 0))  # white, where nothing shows of it
    layer.paste((255, 255, 255, 255), (32, 0, 64, 64))
    layer.save(tmp_path / "layer.png")

    def drawn(photo: Path | Image.Image, mask: Path | Image.Image) -> bytes:
        return generator.generate(PROMPT, init_image=photo, mask_image=mask, strength=0.8, seed=SEED)[0].tobytes()

    expected = drawn(tmp_path / "photo.png", tmp_path / "layer.png")
    with Image.open(tmp_path / "photo.png") as photo, Image.open(tmp_path / "layer.png") as mask:
        assert drawn(photo, mask) == expected
