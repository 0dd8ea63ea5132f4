"""The report of a training: made of what is on the disk, whole also where something is missing."""

import re
from pathlib import Path

import pytest
from PIL import Image

from src.dataset import Example
from src.train_config import TrainRun
from src.training import training_report
from src.training.history import History
from src.training.samples import save_samples
from src.training.scores import choose_best
from src.training.training_report import smoothed
from tests.test_report import HOSTILE, read

PROMPTS = ["a photo of sks fox", "sks fox, ink"]
FACTS = {"trigger": "sks fox", "model": "tiny (SD1)"}
SECONDS = {"load": 2.0, "train": 90.0, "checkpoints": 1.5}


def run_of(folder: Path, *, steps: int = 300, judged: bool = True, prompts: list[str] = PROMPTS) -> History:
    history = History(folder / "log.jsonl")
    for step in range(5, steps + 1, 5):
        history.add("train", step, loss=0.1 + 1 / step, lr=1e-4, grad_norm=0.3)
    for step in range(0, steps + 1, 100) if judged else ():
        history.add("validation", step, loss=0.2 - step / 2000)
        save_samples(folder, step, [Image.new("RGB", (64, 64), (step % 256, 90 * index, 0)) for index in range(2)], prompts, 0)
        history.add("samples", step, prompts=prompts)
        history.add("score", step, clip_i=0.5 + step / 1000, clip_t=0.3 - (step / 1000) ** 2)
    history.add("event", 35, text="step 35 skipped: the gradient was no number")
    history.flush()
    return history


def photos_of(folder: Path, count: int) -> list[Example]:
    (folder / "photos").mkdir()
    examples = []
    for index in range(count):
        path = folder / "photos" / f"{index:02}.png"
        Image.new("RGB", (40, 30), (7 * index, 0, 0)).save(path)
        examples.append(Example(path, (f"caption {index}",), (32, 32), (40, 30), (0, 0), sha256=""))
    return examples


def write(folder: Path, history: History, photos: list[Example], **changes: object) -> str:
    settings = {"facts": FACTS, "seconds": SECONDS, "best": choose_best(history, [100, 200, 300])} | changes
    path = training_report.write(folder, TrainRun(), history, photos=photos, **settings)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_everything_is_in_it_and_nothing_from_elsewhere(tmp_path) -> None:
    page = write(tmp_path, run_of(tmp_path), photos_of(tmp_path, 3))
    reader = read(page.encode())
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["Curves", "Samples", "Scores", "Where the time went", "Pictures", "Settings", "Events"]
    for text in ("Training of sks fox", "tiny (SD1)", "caption 2", "base model", "step 300", "CLIP-T", "learning_rate",
                 "step 35 skipped", "1 min 34 s in all", "train (96%)", *PROMPTS):  # fmt: skip
        assert text in reader.text, text
    charts = [attributes["aria-label"] for tag, attributes in reader.tags if tag == "svg"]
    assert charts[:4] == ["Training loss", "Validation loss", "Learning rate", "Gradient norm before clipping"]
    pictures = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(pictures) == 2 * 4 + 3
    assert all(attributes["src"].startswith("data:image/") for attributes in pictures)
    assert re.findall("https?:|<script|<link|@import", page) == []
    assert reader.open == []


def test_the_best_is_marked_in_table_grid_and_curves(tmp_path) -> None:
    history = run_of(tmp_path)
    best = choose_best(history, [100, 200, 300])
    page = write(tmp_path, history, [])
    assert re.search(rf'<tr class="marked"><td[^>]*>{best.step}, best', page)
    assert f"step {best.step}, best" in page
    assert f"step {best.step}: {best.reason}" in read(page.encode()).text
    assert page.count(">best<") == 2  # the legends of loss and validation


def test_it_is_made_again_from_what_is_on_the_disk(tmp_path) -> None:
    photos = photos_of(tmp_path, 2)
    before = write(tmp_path, run_of(tmp_path), photos)
    training_report._figure.cache_clear()
    training_report._photo.cache_clear()
    assert write(tmp_path, History(tmp_path / "log.jsonl"), photos) == before


def test_a_resume_does_not_show_what_it_dropped(tmp_path) -> None:
    history = run_of(tmp_path)
    history.rewind(200)
    page = write(tmp_path, history, [], best=None)
    assert "step 200" in page
    assert "step 300" not in page


def test_what_was_not_measured_is_left_out_and_said(tmp_path) -> None:
    page = write(tmp_path, run_of(tmp_path, judged=False), [], seconds={}, best=None)
    assert re.findall("<h2>(.*?)</h2>", page) == ["Curves", "Settings", "Events"]
    assert "No pictures were held out" in page
    empty = History(None)
    assert "<svg" in write(tmp_path, empty, [], best=None)
    empty.add("validation", 100, loss=0.3)
    page = write(tmp_path, empty, [], best=None)
    assert "Scores" in page
    assert "CLIP-I" not in page


def test_pictures_that_are_gone_or_damaged_do_not_stop_it(tmp_path) -> None:
    history, photos = run_of(tmp_path), photos_of(tmp_path, 3)
    photos[1].path.unlink()
    (tmp_path / "samples" / "step-000100-0.png").unlink()
    (tmp_path / "samples" / "step-000100-1.png").write_bytes(b"no picture")
    page = write(tmp_path, history, photos)
    assert "Pictures (2 of 3)" in page
    assert "damaged" in page
    assert page.count("<img") == 2 * 4 - 2 + 2


def test_prompts_and_captions_of_strangers_stay_text(tmp_path) -> None:
    text = HOSTILE.replace("\ud800", "")
    photos = [Example(item.path, (text,), item.size_px, item.original_px, (0, 0), sha256="") for item in photos_of(tmp_path, 1)]
    page = write(tmp_path, run_of(tmp_path, prompts=[text, text]), photos, facts={"trigger": text})
    reader = read(page.encode())
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.text.count("<script>alert(1)</script>") >= 5


def test_many_steps_and_photos_are_chosen_from(tmp_path) -> None:
    page = write(tmp_path, run_of(tmp_path, steps=2500), photos_of(tmp_path, 30), best=None)
    columns = re.findall(r'<th scope="col">step ([\d,]+)</th>', page)
    assert len(columns) == training_report.MAX_COLUMNS - 1
    assert columns[-1] == "2,500"
    assert "13 of 26 steps are shown" in page
    assert "Pictures (24 of 30)" in page


@pytest.mark.parametrize("count", [14, 26, 100])
def test_the_best_is_always_among_those_shown(count) -> None:
    for best in range(1, count):
        shown = training_report._spread(list(range(count)), 13, always=best)
        assert len(shown) == 13
        assert shown == sorted(set(shown))
        assert {0, best, count - 1} <= set(shown)


def test_settings_that_were_chosen_are_marked(tmp_path) -> None:
    run = TrainRun()
    run.train.rank, run.train.sample_prompts = 16, ("one", "two")
    path = training_report.write(tmp_path, run, History(None), photos=[], facts={}, seconds={}, best=None)
    marked = re.findall(r'<tr class="marked"><td>(\w+)</td><td>([^<]*)</td>', path.read_text(encoding="utf-8"))
    assert marked == [("rank", "16"), ("sample_prompts", "one\ntwo")]


def test_smoothing_by_hand() -> None:
    assert smoothed([]) == []
    assert smoothed([(5, 0.25)]) == [(5, 0.25)]
    assert [y for _, y in smoothed([(x, 2.0) for x in range(100)])] == pytest.approx([2.0] * 100), "a constant stays"
    # A step from 0 to 1: a thirtieth of the points beside it, half of what is left to go, alike on both sides.
    points = [(x, 0.0) for x in range(600)] + [(x, 1.0) for x in range(600, 1200)]
    curve = smoothed(points)
    assert (curve[599][1] + curve[600][1]) / 2 == pytest.approx(0.5, abs=1e-6)
    assert curve[600 + 40][1] == pytest.approx((1 + curve[600][1]) / 2, abs=1e-4)
    assert curve[599 - 40][1] == pytest.approx(curve[599][1] / 2, abs=1e-4)
    # A line stays where it is, but for the ends.
    line = smoothed([(x, 3.0 * x) for x in range(1000)])
    assert line[500][1] == pytest.approx(1500, abs=0.1)
