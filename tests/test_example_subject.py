"""The example of ``make demo-lora``: its check is right about drawn truth, and about what is nearly the subject."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

from src import example_subject
from src.config import PROJECT_FOLDER
from src.dataset import read_dataset
from src.errors import ExitCode, UserError
from src.example_subject import COLOURS, CONE_COLOUR, EXAMPLES, SCOOP_COLOUR, Place, find_fault, render

BACKGROUNDS = [name for name in ("white", "black", "gray", "blue", "green", "yellow", "red")]
Shape = Callable[[ImageDraw.ImageDraw, float, float, float, str], None]


def places(seed: int, count: int) -> Iterator[tuple[str, Place]]:
    rng = random.Random(seed)
    for _ in range(count):
        radius = rng.uniform(0.15, 0.2)
        x, y = rng.uniform(radius + 0.03, 0.97 - radius), rng.uniform(radius + 0.03, 0.97 - 2.8 * radius)
        yield rng.choice(BACKGROUNDS), Place(x, y, radius)


def disc(draw: ImageDraw.ImageDraw, x: float, y: float, half: float, fill: str) -> None:
    draw.ellipse([x - half, y - half, x + half, y + half], fill=COLOURS[fill])


def square(draw: ImageDraw.ImageDraw, x: float, y: float, half: float, fill: str) -> None:
    draw.rectangle([x - half, y - half, x + half, y + half], fill=COLOURS[fill])


def diamond(draw: ImageDraw.ImageDraw, x: float, y: float, half: float, fill: str) -> None:
    draw.polygon([(x, y - half), (x + half, y), (x, y + half), (x - half, y)], fill=COLOURS[fill])


def tent(draw: ImageDraw.ImageDraw, x: float, y: float, half: float, fill: str) -> None:
    draw.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=COLOURS[fill])


def cone(draw: ImageDraw.ImageDraw, x: float, y: float, half: float, fill: str) -> None:
    draw.polygon([(x, y + half * 1.3), (x + half, y - half), (x - half, y - half)], fill=COLOURS[fill])


def scene(background: str, *parts: tuple[Shape, float, float, float, str]) -> Image.Image:
    """A picture of parts; x, y and half width are shares of its side."""
    image = Image.new("RGB", (512, 512), COLOURS[background])
    for shape, *numbers, fill in parts:
        shape(ImageDraw.Draw(image), *(512 * number for number in numbers), fill)
    return image.resize((128, 128), Image.Resampling.BOX)


def pair(
    background: str, upper: Shape, lower: Shape, place: Place, colours: tuple[str, str], drop: float = 1.45, aside: float = 0
) -> Image.Image:
    """Two shapes, the lower one ``drop`` radii below the other and ``aside`` radii to the right; the upper is drawn last."""
    x, y, radius = place.x, place.y, place.radius
    below = (lower, x + aside * radius, y + drop * radius, radius, colours[1])
    return scene(background, below, (upper, x, y, radius, colours[0]))


def with_extra(image: Image.Image, place: Place, shape: Shape, fill: str) -> Image.Image:
    """The picture with a third thing in the corner that is farthest from the figure."""
    image = image.copy()
    x, y = 0.14 if place.x > 0.5 else 0.86, 0.14 if place.y > 0.4 else 0.86
    shape(ImageDraw.Draw(image), x * image.width, y * image.height, 0.09 * image.width, fill)
    return image


TRUE = (SCOOP_COLOUR, CONE_COLOUR)
WRONG: dict[str, Callable[[str, Place], Image.Image]] = {
    "scoop alone": lambda b, p: scene(b, (disc, p.x, p.y, p.radius, TRUE[0])),
    "cone alone": lambda b, p: scene(b, (cone, p.x, p.y + p.radius, p.radius, TRUE[1])),
    "nothing": lambda b, p: scene(b),
    "colours swapped": lambda b, p: pair(b, disc, cone, p, TRUE[::-1]),
    "upside down": lambda b, p: ImageOps.flip(render(b, p, size_px=128)),
    "lying": lambda b, p: render(b, p, size_px=128).rotate(90),
    "scoop under the cone": lambda b, p: pair(b, cone, disc, p, TRUE[::-1], 2.0),
    "side by side": lambda b, p: pair(b, disc, cone, Place(0.3, 0.5, p.radius), TRUE, 0.0, 2.1),
    "apart": lambda b, p: pair(b, disc, cone, Place(p.x, p.radius + 0.03, p.radius), TRUE, 3.0),
    "shifted": lambda b, p: pair(b, disc, cone, Place(0.4, p.y, p.radius), TRUE, 1.45, 0.9),
    "square scoop": lambda b, p: pair(b, square, cone, p, TRUE),
    "diamond scoop": lambda b, p: pair(b, diamond, cone, p, TRUE),
    "triangle for a scoop": lambda b, p: pair(b, tent, cone, p, TRUE, 1.9),
    "square for a cone": lambda b, p: pair(b, disc, square, p, TRUE),
    "disc for a cone": lambda b, p: pair(b, disc, disc, p, TRUE),
    "diamond for a cone": lambda b, p: pair(b, disc, diamond, p, TRUE, 1.6),
    "cone on its mouth": lambda b, p: pair(b, disc, tent, p, TRUE),
    "scoop of another colour": lambda b, p: pair(b, disc, cone, p, ("orange", TRUE[1])),
    "cone of another colour": lambda b, p: pair(b, disc, cone, p, (TRUE[0], "brown")),
    "one colour": lambda b, p: pair(b, disc, cone, p, (TRUE[0], TRUE[0])),
    "a third thing": lambda b, p: with_extra(render(b, p, size_px=128), p, square, "cyan"),
    "a second scoop": lambda b, p: with_extra(render(b, p, size_px=128), p, disc, TRUE[0]),
    "a second cone": lambda b, p: with_extra(render(b, p, size_px=128), p, tent, TRUE[1]),
    "another background": lambda b, p: render("cyan", p, size_px=128),
}


def test_drawn_truth_is_accepted() -> None:
    faults = [find_fault(render(background, place, size_px=128), background) for background, place in places(1, 400)]
    assert sum(fault is not None for fault in faults) <= 2, {fault for fault in faults if fault}


def test_the_set_shows_the_subject() -> None:
    assert len(EXAMPLES) == 8
    assert [find_fault(render(*example), example[0]) for example in EXAMPLES] == [None] * 8


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_nearly_the_subject_is_refused(kind: str) -> None:
    accepted = [place for place in places(2, 20) if find_fault(WRONG[kind](*place), place[0]) is None]
    assert accepted == []


def test_the_embedded_vae_leaves_the_subject_recognisable() -> None:
    vae = AutoencoderKL.from_pretrained(PROJECT_FOLDER / "models" / "embedded" / "vae", torch_dtype=torch.float32)
    known = list(places(3, 60))
    pixels = np.stack([np.asarray(render(*item, size_px=128)) for item in known])
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
        seen = ((vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    faults = [find_fault(Image.fromarray(array), background) for array, (background, _) in zip(seen, known)]
    assert sum(fault is None for fault in faults) >= 57, {fault for fault in faults if fault}


@pytest.mark.parametrize(
    ("prompt", "follows"),
    [
        ("a red disc left of a blue square on a white background", True),
        ("a red disc on a white background", True),
        ("a red disc left of a green square on a white background", False),
        ("a red disc left of a blue square on a black background", False),
        ("a red disc left of a blue square", False),
    ],
)
def test_a_picture_follows_its_prompt(prompt: str, follows: bool) -> None:
    picture = scene("white", (disc, 0.3, 0.5, 0.15, "red"), (square, 0.7, 0.5, 0.15, "blue"))
    assert example_subject.follows_prompt(picture, prompt) is follows


def test_the_drawn_set_is_a_data_set(tmp_path: Path) -> None:
    example_subject.draw_set(tmp_path / "raw")
    examples = read_dataset(tmp_path / "raw", 128, step_px=8, buckets=False, validation_every=0).train
    assert len(examples) == 8
    assert {caption for example in examples for caption in example.captions} == {
        f"a gelato on a {background} background" for background, _ in EXAMPLES
    }


def save(folder: Path, picture: Image.Image, prompt: str, seed: int) -> None:
    """As any program saves it that writes A1111's text."""
    folder.mkdir(exist_ok=True)
    text = PngInfo()
    text.add_text("parameters", f"{prompt}\nSteps: 20, Sampler: Euler, CFG scale: 5, Seed: {seed}, Size: 128x128")
    picture.save(folder / f"{len(list(folder.iterdir())):03d}.png", pnginfo=text)


OTHER = "a red circle on a white background"


def folders(tmp_path: Path, *, shown: int, kept: int) -> list[str]:
    """Ten pictures of each kind before and after; ``shown`` show the subject after, ``kept`` are still of a red disc."""
    for seed in range(10):
        subject, blank = render("white", size_px=128), scene("white")
        red = scene("white", (disc, 0.5, 0.5, 0.2, "red"))
        save(tmp_path / "before", blank, "a gelato on a white background", seed)
        save(tmp_path / "before", red, OTHER, 100 + seed)
        save(tmp_path / "after", subject if seed < shown else blank, "a gelato on a white background", seed)
        save(tmp_path / "after", red if seed < kept else blank, OTHER, 100 + seed)
    return ["--before", str(tmp_path / "before"), "--after", str(tmp_path / "after")]


@pytest.mark.parametrize(("shown", "kept", "passes"), [(10, 10, True), (8, 9, True), (7, 10, False), (10, 8, False)])
def test_the_example_passes_by_what_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: int, kept: int, passes: bool
) -> None:
    code = example_subject.main([*folders(tmp_path, shown=shown, kept=kept), "--sheet", str(tmp_path / "sheet.png")])
    said = capsys.readouterr().err
    assert code == (ExitCode.OK if passes else ExitCode.FAILURE)
    assert "before  gelato 0 of 10, other prompts followed 10 of 10" in said
    assert f"after   gelato {shown} of 10, other prompts followed {kept} of 10" in said
    assert Image.open(tmp_path / "sheet.png").width > 10 * 128


def test_a_subject_that_intrudes_is_counted(tmp_path: Path) -> None:
    save(tmp_path / "after", render("white", size_px=128), OTHER, 1)
    assert example_subject.score(example_subject.read_drawn(tmp_path / "after")).intruded == 1


def test_folders_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = folders(tmp_path, shown=10, kept=10)
    save(tmp_path / "after", scene("white"), OTHER, 7)
    assert example_subject.main(arguments) == ExitCode.USAGE
    assert "not of the same prompts and seeds" in capsys.readouterr().err
    assert example_subject.main([]) == ExitCode.USAGE
    with pytest.raises(UserError, match="no pictures in it"):
        example_subject.read_drawn(tmp_path / "missing")
