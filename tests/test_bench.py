"""The bench names its parts, and times what the program really answers."""

import pytest
import torch
from PIL import Image

from src.bench import __main__ as bench
from src.bench import quality, speed, train
from src.bench.script_loop import ScriptLoop
from src.errors import UserError
from src.example_subject import COLOURS
from src.generator import TextToImageGenerator
from tests.tiny import pipelines


def test_an_unknown_part_is_one_line(capsys) -> None:
    assert bench.main(["swop"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: there is no bench 'swop'; there are: start, swap, speed, quality, train"
    ]


def test_start_times_each_door_beside_a_bare_interpreter(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "RUNS", 1)
    assert bench.main(["start"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" ms")]
    assert len(rows) == 4
    assert all(float(row.split()[-2]) > 0 for row in rows)


def test_both_sides_of_the_speed_bench_draw(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(speed, "STEPS", 2)
    model = pipelines.save(pipelines.sd1(), tmp_path / "model")
    for precision in ("fp32", "bf16"):
        pictures = [speed.load_stock(model, 64, precision)().images[0], *speed.load_ours(model, 64, precision)()]
        assert [picture.size for picture in pictures] == [(64, 64)] * 2


def test_speeds_are_told_beside_the_stock_scripts(tmp_path, monkeypatch) -> None:
    """Medians of the rounds; the ratio is that of a picture in a warm process."""
    seconds = iter([8.0, 6.0, 4.0, 2.0] * 2 + [80.0, 60.0, 40.0, 20.0])
    monkeypatch.setattr(speed, "_measure", lambda side, model, size: speed.Measured(1.0, 9.0, next(seconds), 3 * 10**9))
    lines = list(speed.run(tmp_path, full=False))
    assert [line.split()[:2] for line in lines[2:]] == [side.split() for side in speed.SIDES]
    assert all("3.00 GB" in line for line in lines[2:])
    assert [line.partition("1/")[2].split()[0] for line in lines[2:]] == ["1.00", "1.33", "2.00", "4.00"]


def test_each_option_is_told_beside_plain(tmp_path, monkeypatch) -> None:
    """The settings reach the pictures, and a difference is the mean of the levels'."""
    monkeypatch.setattr(quality, "STEPS", 4)
    texts, calls = quality.prompts()[:2], []
    monkeypatch.setattr(quality, "prompts", lambda: texts)
    draw = TextToImageGenerator.generate
    monkeypatch.setattr(TextToImageGenerator, "generate", lambda *args, **named: calls.append(named) or draw(*args, **named))
    lines = list(quality.run(tmp_path, full=False))
    assert [line[:31].strip() for line in lines[2:]] == list(quality.OPTIONS)
    assert [line[31:].split()[3] for line in lines[2:3]] == ["0.0"]
    assert all(float(line[31:].split()[3]) > 0 for line in lines[3:])
    drawn = [named for named in calls if named["num_inference_steps"] != 2 or named["seed"]]
    assert [named.get("deep_cache", 1) for named in drawn if named["seed"] == 1] == [1, 1, 1, 2, 3, 5, 1, 1, 1, 1, 1, 2]
    black, gray = (Image.new("RGB", (2, 2), level) for level in ((0, 0, 0), (3, 6, 0)))
    assert quality._difference([black, black], [gray, black]) == 1.5


def test_the_prompts_are_of_the_embedded_models_grammar() -> None:
    """Three colours each, that a judge can tell apart."""
    for text in quality.prompts():
        words = [word for word in text.split() if word in COLOURS]
        assert len(set(words)) == 3, text


def test_the_scripts_loop_trains_and_ours_is_timed_on_the_same_pictures(tmp_path) -> None:
    model = pipelines.save(pipelines.sd1(), tmp_path / "model")
    data = train.write_pictures(tmp_path / "data", 64)
    loop = ScriptLoop(str(model), data, 64, batch_size=2, rank=4, precision="no")
    assert all("attn" in name for name, item in loop.unet.named_parameters() if item.requires_grad)
    before = [parameter.detach().clone() for parameter in loop.learning]
    losses = list(loop.steps(6))  # more than the 4 batches of an epoch
    assert len(losses) == 6
    assert all(0 < loss < 3 for loss in losses)
    assert any(not torch.equal(old, new) for old, new in zip(before, loop.learning))
    setting = train.Setting(str(model), 64, 2, "no", steps=4)
    times = train.time_ours(setting, data, tmp_path / "ours")
    assert len(times) == 4 - train.WARM_UP_STEPS
    assert not list((tmp_path / "ours").glob("checkpoint-*"))
    assert len(train.time_reference(setting, data)) == 4 - train.WARM_UP_STEPS


def test_the_script_is_timed_by_its_progress_bar(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "assert '--resolution=64' in sys.argv and '--mixed_precision=bf16' in sys.argv, sys.argv\n"
        "for step in range(7):\n"
        "    sys.stderr.write(f'\\rSteps:  1%| | {step}/6 [00:00<00:00,  1it/s, loss=0.1]'); sys.stderr.flush(); time.sleep(0.05)\n"
    )
    (seconds,) = train._time_script(train.Setting("m", 64, 1, "bf16", steps=6), tmp_path, script, tmp_path / "out")
    assert 0.04 < seconds < 0.2
    script.write_text("import sys; sys.exit('torchvision is missing')")
    with pytest.raises(UserError, match="torchvision is missing"):
        train._time_script(train.Setting("m", 64, 1, "no", steps=6), tmp_path, script, tmp_path / "out")
