"""Pictures of the subject's class, drawn by the model itself before it learns, for prior preservation.

DreamBooth, Ruiz et al. 2023, arXiv 2208.12242, section 3.2. Trained beside the subject, they keep what "a dog" looks like
while "sks dog" is learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from src import files, images
from src.generator import TextToImageGenerator
from src.images import PICTURE_SUFFIXES
from src.request import PictureRequest
from src.train_config import TrainRun

FIRST_SEED = 1_000_000  # away from the small seeds that people draw with


def draw_class_images(run: TrainRun, folder: Path, say: Callable[[str], None]) -> None:
    """Fill ``folder`` up to ``num_class_images`` pictures of ``class_prompt``, each with its prompt as caption beside it.

    Pictures that are there count, whoever made them. Wildcards such as {red|green} are filled in by the picture's seed, and
    stand filled in its caption.
    """
    train = run.train
    files.check_writable_folder(folder)
    there = sum(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.iterdir())
    missing = train.num_class_images - there
    if missing <= 0:
        return
    say(f"class   drawing {missing} pictures of '{train.class_prompt}' into {folder}")
    generator = TextToImageGenerator(run.app_config())
    request = PictureRequest.from_config(
        generator.config.generation, train.class_prompt, num_images=missing, seed=FIRST_SEED + there,
        num_inference_steps=train.sample_inference_steps, guidance_scale=train.sample_guidance_scale,
        width=train.resolution, height=train.resolution,
    )  # fmt: skip
    for picture in generator.draw(request):
        path = images.save_picture(picture, folder, "class", there)
        files.publish_bytes(path.with_suffix(".txt"), picture.info["drawn"].prompt.encode())
    generator.unload()
