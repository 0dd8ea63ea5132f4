"""The verb quality from folders to files: the figures are the metrics', too few pictures are said, copies are found."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from src import evaluate
from src.errors import UserError
from src.evaluation import figures, inputs, metrics, quality, quality_report
from src.evaluation.features import ClipFeatures, extract
from src.evaluation.figures import Seen
from src.evaluation.skills import choose
from src.scenes import drawing
from src.terminal import Terminal
from tests.tiny.clips import save_clip

INFOTEXT = "{}\nSteps: 20, Sampler: Euler, CFG scale: 5, Seed: 1, Size: 32x32"


def draw(path: Path, seed: int, prompt: str | None = None, tint: int = 0) -> None:
    """A picture of smooth noise, with A1111's recipe where there is a prompt."""
    levels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype="uint8")
    picture = Image.fromarray(np.clip(levels.astype(int) + tint, 0, 255).astype("uint8")).resize((40, 36))
    chunks = PngImagePlugin.PngInfo()
    if prompt is not None:
        chunks.add_text("parameters", INFOTEXT.format(prompt))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, pnginfo=chunks)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("quality") / "clip")


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """20 real pictures and 12 generated ones, 10 of them with prompts, 1 with a caption; the last is a copy of real 7."""
    real, generated = tmp_path / "real", tmp_path / "drawn"
    for index in range(20):
        draw(real / f"{index:02}.png", index)
    for index in range(12):
        draw(
            generated / f"{index:02}.png", 100 + index, f"a (red:1.3) circle {index} <lora:ink:0.8>" if index < 10 else None, 40
        )
    (generated / "10.txt").write_text("two green stars")
    draw(generated / "11.png", 7, "")
    return real, generated


@pytest.fixture
def no_clips(monkeypatch, tmp_path) -> Path:
    """A folder whose ``embedded`` and ``hub`` are looked into for a CLIP, and which is the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("src.training.scores.user_cache", lambda: tmp_path / "hub")
    for module in ("src.training.scores", "src.evaluation.features"):
        monkeypatch.setattr(f"{module}.EMBEDDED", tmp_path / "embedded")
    return tmp_path


def run(folders: tuple[Path, Path], *more: object) -> int:
    real, generated = folders
    output = real.parent / "out"
    return evaluate.main(
        ["quality", "--real", str(real), "--generated", str(generated), "--output", str(output), *map(str, more)]
    )


def result_of(folders: tuple[Path, Path]) -> dict:
    return json.loads((folders[0].parent / "out" / "result.json").read_text(encoding="utf-8"))


# --- from folders to files -------------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_metrics(folders, clip_folder, capsys) -> None:
    assert run(folders, "--clip", clip_folder) == 0
    result = result_of(folders)
    clip = ClipFeatures(clip_folder, "cpu")
    real, generated = (extract(clip, sorted(folder.glob("*.png")), Terminal(), "clip")["features"] for folder in folders)
    texts = clip.text_features([*(f"a red circle {index}" for index in range(10)), "two green stars"])
    score, kernel = metrics.clip_score(generated[:11], texts), metrics.kernel_distance(real, generated, 100, 6, 0)
    found = {figure["key"]: figure for figure in result["figures"]}
    assert {key: found[key]["value"] for key in found} == pytest.approx({
        "clip_score": score.mean,
        "cmmd": metrics.cmmd(real, generated),
        "frechet_distance": metrics.frechet_distance(real, generated),
        "kernel_distance": kernel.mean,
        "precision": metrics.precision_recall(real, generated)[0],
        "recall": metrics.precision_recall(real, generated)[1],
        "density": metrics.density_coverage(real, generated)[0],
        "coverage": metrics.density_coverage(real, generated)[1],
        "authenticity": (metrics.closeness(real, generated) > 1).mean(),
    })  # fmt: skip
    assert (found["clip_score"]["std"], found["kernel_distance"]["std"]) == pytest.approx((score.std, kernel.std))
    assert found["clip_score"]["based_on"] == "11 of 12 generated have a prompt"
    assert found["kernel_distance"]["based_on"] == "20 real, 12 generated; 100 subsets of 6"
    assert found["frechet_distance"]["note"].startswith("biased upwards: fewer pictures than the 16 features")
    assert found["recall"]["based_on"] == "20 real, 12 generated; k = 3"
    assert result["real"] == {"folder": "real", "pictures": 20, "found": 20}
    assert (result["prompts"], result["seed"], result["extractors"]) == (11, 0, {"CLIP clip": 16})
    assert {"Python", "torch", "transformers"} <= result["versions"].keys()
    printed = capsys.readouterr()
    assert all(figure["name"] in printed.out for figure in result["figures"])
    assert "Inception none" in printed.err


def test_a_copy_is_the_first_of_the_nearest(folders, clip_folder) -> None:
    assert run(folders, "--clip", clip_folder) == 0
    first, *others = result_of(folders)["nearest"]
    assert (first["generated"], first["real"][0], first["distances"][0], first["closeness"]) == ("11.png", "07.png", 0, 0)
    assert len(first["real"]) == 3
    assert [item["closeness"] for item in others] == sorted(item["closeness"] for item in others)
    assert others[0]["closeness"] > 0


def test_the_report_is_one_offline_file(folders, clip_folder) -> None:
    assert run(folders, "--clip", clip_folder) == 0
    page = (folders[0].parent / "out" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count("<img") == 20 + 12 + 8 * 4
    assert "a red circle 3" in page
    assert "biased upwards by about" in page
    assert page.count('<tr class="marked">') == 1  # the copy
    assert str(folders[0]) not in page


def test_a_sample_is_drawn_by_the_seed(folders, clip_folder, capsys) -> None:
    assert run(folders, "--clip", clip_folder, "--max-pictures", 8, "--seed", 3, "--prompts", "none") == 0
    result = result_of(folders)
    assert result["real"] == {"folder": "real", "pictures": 8, "found": 20}
    assert (result["prompts"], "clip_score" in {figure["key"] for figure in result["figures"]}) == (None, False)
    assert "8 pictures of 20" in capsys.readouterr().err
    pictures = sorted(folders[0].glob("*.png"))
    one, same, other = (inputs.sample(pictures, 8, seed) for seed in (3, 3, 4))
    assert one == same == sorted(one)
    assert one != other
    assert inputs.sample(pictures, 20, 3) == inputs.sample(pictures, None, 3) == pictures


def test_too_few_pictures_are_said_beside_the_figure(tmp_path, clip_folder, capsys) -> None:
    folders = tmp_path / "real", tmp_path / "drawn"
    for folder, first in zip(folders, (0, 50)):
        for index in range(3):
            draw(folder / f"{index}.png", first + index)
    assert run(folders, "--clip", clip_folder) == 0
    found = {figure["key"]: figure for figure in result_of(folders)["figures"]}
    assert {key for key in found if found[key]["value"] is None} == {
        "clip_score", "kernel_distance", "precision", "recall", "density", "coverage",
    }  # fmt: skip
    assert found["precision"]["note"] == "not measured: it takes 4, there are 3"
    assert found["clip_score"]["note"] == "not measured: it takes 1, there are 0"
    assert "nan" not in capsys.readouterr().out.lower()


def test_one_picture_a_side_is_reported_without_figures(tmp_path, clip_folder) -> None:
    folders = tmp_path / "real", tmp_path / "drawn"
    for folder, seed in zip(folders, (0, 50)):
        draw(folder / "0.png", seed, "a circle")
    assert run(folders, "--clip", clip_folder) == 0
    result = result_of(folders)
    assert [figure["key"] for figure in result["figures"] if figure["value"] is not None] == ["clip_score"]
    assert result["nearest"] == []


def test_inception_gives_its_own_figures(folders) -> None:
    rows = np.random.default_rng(0)
    seen = Seen("Inception v3", rows.normal(size=(40, 6)), rows.normal(size=(50, 6)), rows.normal(size=(50, 9)))
    found = {figure.name: figure for figure in figures.of_inception(seen, seed=0)}
    assert list(found) == ["FID", "KID", "inception score", "precision", "recall", "density", "coverage", "authenticity"]
    assert found["inception score"].value == metrics.inception_score(seen.logits).mean
    assert found["inception score"].note == "biased downwards: splits of about 5 pictures"
    assert found["FID"].note == "biased upwards below 10,000 pictures; go by the kernel figures"
    few = figures.of_inception(replace(seen, generated=seen.generated[:9], logits=seen.logits[:9]), seed=0)
    assert next(figure for figure in few if figure.key == "inception_score").note == "not measured: it takes 10, there are 9"


def test_a_large_sample_needs_no_notes() -> None:
    seen = Seen("CLIP", *(np.random.default_rng(seed).normal(size=(1000, 4)) for seed in (0, 1)))
    found = {figure.key: figure for figure in figures.of_clip(seen, None, None, 0)}
    assert [key for key in found if found[key].note] == ["frechet_distance"]
    assert found["kernel_distance"].based_on.endswith("100 subsets of 500")


def test_a_real_picture_that_is_there_twice_has_no_closeness() -> None:
    real, generated = np.array([[0.0], [0.0], [9.0]]), np.array([[1.0], [8.0]])
    one, other = quality_report.copies(Seen("CLIP", real, generated))
    assert (one.generated, one.closeness) == (1, pytest.approx(1 / 9))
    assert (other.generated, other.closeness) == (0, None)


def test_held_out_scenes_are_drawn_where_they_are_asked_for(folders, clip_folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run((Path("scenes"), folders[1]), "--clip", clip_folder, "--output", tmp_path / "out", "--max-pictures", 8) == 0
    drawn = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / "real").glob("*.png"))]
    expected = [np.asarray(drawing.draw(scene)) for scene in choose(8, 0, "both", lattice_px=8)]
    assert all(np.array_equal(one, other) for one, other in zip(drawn, expected, strict=True))
    told = json.loads((tmp_path / "out" / "result.json").read_bytes())["real"]
    assert told == {"folder": "held-out scenes", "pictures": 8, "found": 8}
    mine = tmp_path / "mine" / "real" / "photo.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"a photo")
    assert run((Path("scenes"), folders[1]), "--clip", tmp_path / "typo", "--output", tmp_path / "mine") == 4
    assert mine.read_bytes() == b"a photo"  # nothing is drawn before all is known to be right
    assert run((Path("scenes"), folders[1]), "--clip", clip_folder, "--output", tmp_path / "mine") == 0
    assert [path.read_bytes() for path in tmp_path.rglob("photo.png")] == [b"a photo"]  # moved aside
    assert run((Path("scenes"), folders[1]), "--clip", clip_folder, "--output", folders[1]) == 2
    assert "its scenes would lie among --generated" in capsys.readouterr().err
    assert not (tmp_path / "out" / "real-set-aside").exists()
    (tmp_path / "scenes").mkdir()  # a folder of that name is what is meant
    assert run((Path("scenes"), folders[1]), "--clip", clip_folder, "--output", tmp_path / "out") != 0
    assert "no pictures in it" in capsys.readouterr().err


def test_more_scenes_are_drawn_than_a_checkpoint_lists_and_take_the_place_of_their_own_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(drawing, "draw", lambda scene: Image.new("RGB", (8, 8), "red"))
    monkeypatch.setattr("src.evaluation.skills.choose", lambda count, *_, **named: [None] * count)
    said: list[str] = []
    side = quality._draw_scenes(tmp_path, 1001, said.append)
    assert (len(side.pictures), side.found, side.is_drawn) == (1001, 1001, True)
    assert sorted((tmp_path / "real").glob("*.png")) == side.pictures
    quality._draw_scenes(tmp_path, 3, said.append)  # in place of those
    assert len(list(tmp_path.rglob("*.png"))) == 3
    draw(tmp_path / "real" / "mine.png", 0)
    quality._draw_scenes(tmp_path, 2, said.append)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")) == [
        "real-set-aside/00000.png", "real-set-aside/00001.png", "real-set-aside/00002.png", "real-set-aside/mine.png",
        "real/00000.png", "real/00001.png",
    ]  # fmt: skip
    assert [line for line in said if "real-set-aside" in line] == [
        f"{tmp_path / 'real'}: holds what was not drawn here; it is now real-set-aside"
    ]


# --- prompts and pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "tenth", "last"),
    [("auto", "two green stars", None), ("recipes", None, None), ("captions", "two green stars", None)],
)
def test_prompts_come_from_recipes_and_captions(folders, source, tenth, last) -> None:
    generated = folders[1]
    (generated / "00.txt").write_text("a caption")
    found = inputs.prompts_of(generated, inputs.pictures_in(generated, "--generated", print), source)
    assert found[0] == ("a caption" if source == "captions" else "a red circle 0")
    assert (found[10], found[11]) == (tenth, last)


@pytest.mark.parametrize(
    ("prompt", "with_weights", "plain"),
    [
        ("a ((red)) [round] (ball:1.4) BREAK on \\(green\\) grass", True, "a red round ball on (green) grass"),
        ("a (red:1.3) ball <lora:ink:0.8>", False, "a (red:1.3) ball"),
        ("un(believ)able", True, "unbelievable"),
        ("broken <lora:", True, "broken <lora:"),
    ],
)
def test_plain_text_has_no_grammar(prompt, with_weights, plain) -> None:
    assert inputs.plain_text(prompt, with_weights) == plain


def test_contact_sheets_and_masks_are_no_pictures(folders) -> None:
    real = folders[0]
    draw(real / "gen_20261121_grid_000.png", 1)
    draw(real / "00-masklabel.png", 1)
    draw(real / "deeper" / "more.jpg", 2)
    said = []
    found = [path.relative_to(real).as_posix() for path in inputs.pictures_in(real, "--real", said.append)]
    assert len(found) == 21
    assert "deeper/more.jpg" in found
    assert "1 left out" in said[0]
    assert "gen_20261121_grid_000.png" in said[0]


def test_of_an_output_folder_the_models_pictures_count(tmp_path, monkeypatch) -> None:
    """The folder as main.py, the evaluation's verbs and the phases leave it."""
    outputs, said = tmp_path / "outputs", list[str]()
    drawn = ["gen_1_000.png", "gen_1_001.png", "evaluation/grid/pictures/cell-01-01_1_000.png"]
    for name in drawn:
        draw(outputs / name, 1, "a circle")
    draw(outputs / "captioned.png", 2)
    (outputs / "captioned.txt").write_text("a square")
    others = [
        "gen_1_preview.png", "gen_1_grid_000.png", "interpolate_000.png", "evaluation/grid/grid.png",
        "evaluation/compare/sheet.png", "evaluation/attention/attention.png", "scratch/vae/samples/step-000002.png",
    ]  # fmt: skip
    for name in others:
        draw(outputs / name, 3)
    (outputs / "evaluation" / "quality").mkdir()
    monkeypatch.setattr(drawing, "draw", lambda scene: Image.new("RGB", (8, 8)))
    real = quality._draw_scenes(outputs / "evaluation" / "quality", 5, said.append).folder
    found = inputs.generated_in(outputs, "--generated", said.append)
    assert {path.relative_to(outputs).as_posix() for path in found} == {*drawn, "captioned.png"}
    assert [int(line.split(": ")[1].split()[0]) for line in said if " left out " in line] == [2, 10]  # 2 by name, 5 + 5 more
    assert len(inputs.generated_in(real, "--generated", said.append)) == 5  # by name, and no picture has a recipe
    for name in drawn:
        draw(outputs / name, 1)
    assert len(inputs.generated_in(outputs, "--generated", said.append)) == 4 + 5  # nothing to tell them apart but the mark
    with pytest.raises(UserError, match="scenes to measure against alone"):
        inputs.generated_in(real.parent, "--generated", said.append)


# --- what is refused, without torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"--real": "nowhere"}, 4, "--real nowhere: no such folder"),
        ({"--generated": "empty"}, 4, "no pictures in it"),
        ({"--generated": "real"}, 2, "share pictures"),
        ({"--real": "."}, 2, "share pictures"),
        ({"--clip": "nowhere"}, 4, "--clip nowhere: no such folder"),
        ({"--clip": "empty"}, 6, "no CLIPModel with both towers"),
        ({"--inception": "nowhere.safetensors"}, 4, "not found"),
        ({"--inception": "weights.pth"}, 6, "pickle"),
        ({"--max-pictures": "0"}, 2, "--max-pictures 0"),
        ({"--seed": "-1"}, 2, "--seed -1"),
        ({"--prompts": "recipe"}, 2, "--prompts"),
        ({"--device": "gpu"}, 2, "gpu"),
        ({"--output": "real/00.png"}, 2, "nothing can be saved there"),
    ],
    ids=lambda value: " ".join(*value.items()) if isinstance(value, dict) else None,
)
def test_mistakes_are_one_line(folders, clip_folder, monkeypatch, capsys, change, code, said) -> None:
    monkeypatch.chdir(folders[0].parent)
    Path("empty").mkdir()
    typed = {"--real": "real", "--generated": "drawn", "--clip": str(clip_folder), "--output": "out"} | change
    assert evaluate.main(["quality", *(f"{flag}={value}" for flag, value in typed.items())]) == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert said in error[0]
    assert not Path("out", "result.json").exists()


def test_without_any_extractor_it_says_what_to_give(folders, no_clips, capsys) -> None:
    assert run(folders) == 4
    assert "give --clip FOLDER, --inception FILE, or both" in capsys.readouterr().err


def test_the_first_clip_on_this_disk_judges_and_the_embedded_models_own_in_want_of_others(folders, no_clips, capsys) -> None:
    save_clip(no_clips / "embedded" / "clip")
    assert run(folders) == 0
    assert "it knows the project's drawn scenes alone" in capsys.readouterr().err
    assert result_of(folders)["extractors"] == {"CLIP embedded": 16}
    storage, commit = no_clips / "hub" / "models--openai--clip-vit-large-patch14", "a" * 40
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(commit)
    save_clip(storage / "snapshots" / commit)
    assert run(folders) == 0
    assert "drawn scenes alone" not in capsys.readouterr().err
    assert result_of(folders)["extractors"] == {"CLIP openai/clip-vit-large-patch14": 16}
