"""Pictures of the subject's class, drawn by the model itself before it learns, for prior preservation.

DreamBooth, Ruiz et al. 2023, arXiv 2208.12242, section 3.2. Trained beside the subject, they keep what "a dog" looks like
while "sks dog" is learnt.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

from src import files, images
from src.generator import TextToImageGenerator
from src.images import PICTURE_SUFFIXES
from src.request import PictureRequest
from src.terminal import counted
from src.train_config import TrainRun

STEM = "class"  # of a picture's name; its number follows
FIRST_SEED = 1_000_000  # away from the small seeds that people draw with


def draw_class_images(run: TrainRun, folder: Path, say: Callable[[str], None]) -> None:
    """Fill ``folder`` up to ``num_class_images`` pictures of ``class_prompt``, each with its prompt as caption beside it.

    Pictures that are there count, whoever made them. The number in a name decides over the picture, so that one that got
    lost comes back as it was. Wildcards such as {red|green} are filled in by the picture's seed, and stand filled in its
    caption. Raises what drawing and saving raise.
    """
    train = run.train
    files.check_writable_folder(folder)
    there = {path.name for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES}
    free = (number for number in itertools.count() if f"{STEM}_{number:03d}.png" not in there)
    missing = list(itertools.islice(free, max(0, train.num_class_images - len(there))))
    if not missing:
        return
    prompt = textwrap.shorten(str(train.class_prompt), 80, placeholder=" ...")
    say(f"class   drawing {counted(len(missing), 'picture')} of '{prompt}' into {folder}")
    generator = TextToImageGenerator(run.app_config(), say=say)
    for _, group in itertools.groupby(enumerate(missing), key=lambda entry: entry[1] - entry[0]):
        numbers = [number for _, number in group]  # consecutive ones
        request = PictureRequest.from_config(
            generator.config.generation, train.class_prompt, num_images=len(numbers), seed=FIRST_SEED + numbers[0],
            num_inference_steps=train.sample_inference_steps, guidance_scale=train.sample_guidance_scale,
            width=train.resolution, height=train.resolution, batch_size=train.batch_size,
        )  # fmt: skip
        for number, picture in zip(numbers, generator.draw(request)):
            prompt = picture.info["drawn"].prompt
            picture.info.clear()  # a recipe tells of the batch; one drawn again shall be the same file, for a resume's sake
            images.save_picture(picture, folder, STEM, number, announce=partial(_write_caption, prompt))
    generator.unload()


def _write_caption(prompt: str, picture: Path, data: bytes) -> None:
    """Before the picture has its name: one that a kill left without caption would count as drawn, and could not be trained."""
    files.publish_bytes(picture.with_suffix(".txt"), prompt.encode())
