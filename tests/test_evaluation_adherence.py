"""The verb: draws, goes on where it was interrupted, checks what was drawn before, and says what it cannot do."""

from __future__ import annotations

import argparse
import html
import json
from pathlib import Path

import pytest
from PIL import Image

from src.errors import ExitCode, UserError
from src.evaluation import adherence, adherence_report, proof, skills
from src.evaluation.mistakes import CHANGES
from src.generator import TextToImageGenerator
from src.model_files import EMBEDDED
from src.scenes import drawing


def options(*words: str, output: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    adherence.add_arguments(parser)
    return parser.parse_args([*words], argparse.Namespace(output=str(output)))


def fast(*words: str, output: Path) -> argparse.Namespace:
    return options("--count", "4", "--steps", "2", "--device", "cpu", *words, output=output)


def test_truth_measures_as_one_and_other_pictures_as_nothing() -> None:
    scenes = skills.choose(24, 2, "both")
    by_caption = {scene.caption: scene for scene in scenes}
    asked: list[tuple[list[str], list[int]]] = []

    def truth(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        asked.append((prompts, seeds))
        return [drawing.draw(by_caption[prompt]) for prompt in prompts]

    scores = adherence.measure(truth, scenes, seed=7, batch_size=5)
    assert scores.overall == skills.Share(12, 12) == scores.skills["unseen combinations"]
    assert [len(prompts) for prompts, _ in asked] == [5, 5, 5, 5, 4]
    assert [seed for _, seeds in asked for seed in seeds] == list(range(7, 31))
    assert adherence.measure(lambda prompts, seeds: [Image.new("RGB", (128, 128))] * len(prompts), scenes).overall.right == 0


def test_it_draws_checks_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adherence.run(fast(output=tmp_path), lambda line: None) == ExitCode.OK
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["settings"] | {"model": "embedded", "count": 4, "steps": 2} == document["settings"]
    assert document["skills"]["overall"]["count"] == 2
    for index, item in enumerate(document["pictures"]):
        with Image.open(tmp_path / item["file"]) as picture:
            recipe = json.loads(picture.info["recipe"])
        assert (recipe["prompt"], recipe["seed"]) == (item["scene"]["caption"], index)
        assert item["verdict"]["all"] in (True, False)
    report = (tmp_path / "report.html").read_text()
    assert all(item["scene"]["caption"] in report for item in document["pictures"])
    assert "http://" not in report
    assert "https://" not in report
    assert "overall" in capsys.readouterr().out


def test_guidance_can_be_kept_to_a_part_of_the_schedule(tmp_path: Path) -> None:
    adherence.run(fast("--count", "1", "--guidance-interval", "0:0.5", output=tmp_path), lambda line: None)
    with Image.open(next((tmp_path / "pictures").iterdir())) as picture:
        recipe = json.loads(picture.info["recipe"])
    assert (recipe["guidance_scale"], recipe["guidance_start"], recipe["guidance_end"]) == (5, 0, 0.5)
    with pytest.raises(UserError, match="write it as START:END"):
        adherence.run(fast("--guidance-interval", "half", output=tmp_path), lambda line: None)


def test_it_goes_on_with_what_is_there_and_refuses_what_is_another_runs(tmp_path: Path, monkeypatch) -> None:
    adherence.run(fast(output=tmp_path), lambda line: None)
    pictures = sorted((tmp_path / "pictures").iterdir())
    before = [path.read_bytes() for path in pictures]
    for path in pictures[1:3]:
        path.unlink()
    drawn: list[str] = []
    draw = TextToImageGenerator.draw

    def noting(self, request, on_step=None, texts=None):
        drawn.extend(texts)
        return draw(self, request, on_step, texts)

    monkeypatch.setattr(TextToImageGenerator, "draw", noting)
    said: list[str] = []
    adherence.run(fast(output=tmp_path), said.append)
    assert any("kept    2" in line for line in said)
    assert len(drawn) == 2
    for path, data in zip(pictures, before):
        with Image.open(path) as now:
            pixels = list(now.tobytes())
        path.write_bytes(data)
        with Image.open(path) as then:
            assert max(abs(a - b) for a, b in zip(pixels, then.tobytes())) <= 24  # bf16, in other batches
    same = ["--model", str(EMBEDDED), "--batch-size", "1"]  # the same folder by its path
    adherence.run(fast(*same, output=tmp_path), said.append)
    assert "kept    4" in said[-2], "what does not change pictures need not be the same"
    with pytest.raises(UserError, match=r"drawn otherwise \(guidance\)") as error:
        adherence.run(fast("--guidance", "3", output=tmp_path), said.append)
    assert error.value.exit_code == ExitCode.REFUSED


def test_pictures_drawn_before_are_checked_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "drawn", tmp_path / "checked"
    scenes = skills.choose(6, 0, "held-out")
    drawn = adherence._Drawn(folder, {"settings": {"seed": 3, "model": "x"}}, scenes, print)
    drawn.check_same()
    for index, scene in enumerate(scenes[:-1]):
        drawing.draw(scene).save(drawn.path(index))
    with pytest.raises(UserError, match=r"0005\.png") as error:
        adherence.run(options("--pictures", str(folder), output=output), print)
    assert error.value.exit_code == ExitCode.NOT_FOUND
    drawing.draw(scenes[0]).save(drawn.path(5))
    adherence.run(options("--pictures", str(folder), output=output), print)
    document = json.loads((output / "result.json").read_text())
    assert [item["all"] for item in document["verdicts"]] == [True] * 5 + [False]
    assert (document["skills"]["overall"]["right"], document["skills"]["overall"]["count"]) == (5, 6)
    assert "overall" in capsys.readouterr().out
    before = (folder / "result.json").read_bytes()
    other = adherence._Drawn(tmp_path / "other", {"settings": {"seed": 3, "model": "y"}}, scenes, print)
    other.check_same()
    drawing.draw(scenes[0]).save(other.path(0))
    with pytest.raises(UserError, match="holds the pictures of another run") as error:
        adherence.run(options("--pictures", str(tmp_path / "other"), output=folder), print)
    assert error.value.exit_code == ExitCode.USAGE
    assert (folder / "result.json").read_bytes() == before
    (tmp_path / "other" / "result.json").unlink()
    with pytest.raises(UserError, match="nobody knows what drew these"):
        other.check_same()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--count", "0"], ExitCode.USAGE, "--count 0"),
        (["--scheduler", "eulr"], ExitCode.USAGE, "did you mean"),
        (["--steps", "0"], ExitCode.USAGE, "steps 0"),
        (["--seed", "4294967295"], ExitCode.USAGE, "--seed"),
        (["--seed", "-1"], ExitCode.USAGE, "--seed -1: give 0 or more"),  # the next run could not go on with random ones
        (["--model", "./typo"], ExitCode.NOT_FOUND, "typo"),
        (["--pictures", "nowhere"], ExitCode.NOT_FOUND, "nowhere"),
        (["--pictures", "nowhere", "--steps", "3"], ExitCode.USAGE, "leave out --steps"),
        (["--prove", "--steps", "3"], ExitCode.USAGE, "leave out --steps"),
        (["--prove", "--count", "399"], ExitCode.USAGE, "take 400 or more"),
        (["--prove", "--pictures", "x"], ExitCode.USAGE, "leave out --pictures"),
    ],
)
def test_mistakes_are_one_line(words: list[str], code: ExitCode, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        adherence.run(options(*words, output=tmp_path / "out"), print)
    assert error.value.exit_code == code


def test_a_foreign_result_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"verb": "quality"}', '{"verb": "adherence", "settings": {"seed": 0}, "pictures": [{}]}'):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(UserError, match="no result of adherence"):
            adherence.run(options("--pictures", str(tmp_path), output=tmp_path), print)


def test_the_proof_prints_its_table_and_fails_out_of_bounds(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(proof, "WEARS", {name: proof.WEARS[name] for name in (proof.AS_RENDERED, proof.WORN)})
    monkeypatch.setattr(proof, "MIN_COUNT", 30)
    adherence.run(options("--prove", "--count", "30", output=tmp_path), print)
    assert json.loads((tmp_path / "proof.json").read_text())["holds"] is True
    assert "wrong pairs" in capsys.readouterr().out
    page = html.unescape((tmp_path / "proof.html").read_text())
    assert all(text in page for text in ("as rendered", *(what for what in CHANGES), "held to be: "))
    assert page.count("<img") == len(proof.WEARS) + len(CHANGES)
    monkeypatch.setattr(proof, "MIN_RIGHT", 1.1)
    with pytest.raises(UserError, match="not within its bounds"):
        adherence.run(options("--prove", "--count", "30", output=tmp_path), print)


def test_a_proof_holds_only_of_enough_pictures_and_of_each_change() -> None:
    share = skills.Share
    right, worn = {"colour": share(0, 100), "size": share(3, 100)}, share(0, 100)
    assert proof.is_refused(share(3, 1000), right, worn)
    assert not proof.is_refused(share(3, 1000), {**right, "size": share(4, 100)}, worn)
    assert not proof.is_refused(share(11, 1000), right, worn)
    assert not proof.is_refused(share(3, 1000), right, share(2, 100))
    assert proof.prove(1, 0, lambda line: None)["holds"] is False
    assert proof.is_accepted({proof.AS_RENDERED: 0.996, proof.WORN: 0.96})
    assert not proof.is_accepted({proof.AS_RENDERED: 0.996, proof.WORN: 0.94})
    assert not proof.is_accepted({proof.AS_RENDERED: 0.99, proof.WORN: 0.99})


def test_the_verb_keeps_small_pictures_only(tmp_path: Path, monkeypatch) -> None:
    scene = skills.choose(1, 0, "held-out")[0]
    drawn = adherence._Drawn(tmp_path, {"settings": {"seed": 0, "model": "x"}}, [scene], print)
    drawn.check_same()
    drawing.draw(scene).resize((1024, 1024)).save(drawn.path(0))
    kept: list[Image.Image] = []
    page = adherence_report.page
    monkeypatch.setattr(
        adherence_report, "page", lambda scores, pictures, facts: (kept.extend(pictures), page(scores, pictures, facts))[1]
    )
    adherence.run(options("--pictures", str(tmp_path), output=tmp_path), print)
    assert [picture.size for picture in kept] == [(128, 128)]


def test_the_report_shows_right_and_wrong_with_the_reason() -> None:
    scenes = skills.choose(4, 0, "held-out")
    pictures = [drawing.draw(scenes[index]) for index in (0, 1, 2, 2)]
    scores = adherence.measure(lambda prompts, seeds: pictures, scenes)
    text = adherence_report.page(scores, pictures, {"settings": {"model": "embedded"}}).decode()
    assert "Right: 3 of 3" in text
    assert "Wrong: 1 of 1" in text
    assert scores.judged[3].verdict.faults[0] in text
