"""Pictures of the class, by a generator that draws grey ones: a kill at any moment leaves none that cannot be trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from src import files
from src.dataset import read_dataset
from src.request import PictureRequest
from src.train_config import TrainRun
from src.training import class_images


class Grey:
    """In place of the generator."""

    def __init__(self, config: object, say: object) -> None:
        self.config = config

    def draw(self, request: PictureRequest) -> Iterator[Image.Image]:
        for index in range(request.num_images):
            picture = Image.new("L", (64, 64), request.seed_of(index) % 256).convert("RGB")
            picture.info["drawn"] = SimpleNamespace(prompt=f"a thing, number {index}")
            yield picture

    def unload(self) -> None:
        pass


def test_no_picture_is_left_without_its_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_images, "TextToImageGenerator", Grey)
    run = TrainRun()
    run.train.class_prompt, run.train.num_class_images, run.train.resolution = "a {red|green} thing", 3, 64
    published = []

    def killed(path: Path, data: bytes) -> Path:
        published.append(path)
        if len(published) == 2:
            raise KeyboardInterrupt
        return publish(path, data)

    publish = files.publish_bytes
    with monkeypatch.context() as patched:
        patched.setattr(files, "publish_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            class_images.draw_class_images(run, tmp_path, print)
    assert [path.name for path in tmp_path.glob("*.png")] == ["class_000.png"]
    class_images.draw_class_images(run, tmp_path, print)
    found = read_dataset(tmp_path, 64, step_px=16, buckets=False, validation_every=0)
    assert [item.path.name for item in found.train] == ["class_000.png", "class_001.png", "class_002.png"]
    assert all(item.captions[0].startswith("a thing, number ") for item in found.train)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
