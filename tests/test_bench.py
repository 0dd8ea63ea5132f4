"""The bench names its parts, and times what the program really answers."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from src import base_models, devices
from src.bench import __main__ as bench
from src.bench import designs, growth, memory, quality, random_models, sdcpp_side, sides, speed, train
from src.bench.report import Report, device_name
from src.bench.script_loop import ScriptLoop
from src.config import PROJECT_FOLDER
from src.errors import ExitCode, UserError
from src.example_subject import COLOURS
from src.generator import TextToImageGenerator
from tests.tiny import pipelines


def test_an_unknown_part_is_one_line(capsys) -> None:
    assert bench.main(["swop"]) == 2
    parts = "start, swap, speed, memory, growth, quality, train, designs"
    assert capsys.readouterr().err.splitlines() == [f"error: there is no bench 'swop'; there are: {parts}"]


def test_help_is_printed(capsys) -> None:
    for word in ("--help", "-h"):
        assert bench.main(["speed", word]) == 0
        assert "--sdcpp PROGRAM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["start", "--full"], 2, "--full changes nothing for start"),
        (["swap", "designs", "--full"], 2, "--full changes nothing for swap and designs"),
        (["memory", "--compiled"], 2, "--compiled changes nothing for memory"),
        (["speed", "--script", __file__], 2, "--script changes nothing for speed"),
        (["speed", "--full", "--openvino", "nope/bin/python"], 4, "--openvino nope/bin/python: no such file"),
        (["speed", "--full", "--sdcpp", "nope"], 4, "--sdcpp nope: no such file"),
        (["speed", "--full", "--openvino", __file__], 2, "is no program"),
        (["train", "--script", "nope.py"], 4, "--script nope.py: no such file"),
    ],
)
def test_what_would_change_nothing_or_fail_after_minutes_is_refused_at_once(words, code, said, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("it began to measure"))
    assert bench.main(words) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_table_is_named_after_what_it_was_measured_on_and_with(monkeypatch, tmp_path) -> None:
    """Only memory and designs ask a card; only what has a full size is called full."""
    monkeypatch.setattr(base_models, "pick_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(base_models, "name_of", lambda device: "H200")
    asked = {}
    monkeypatch.setattr(bench, "_in_folder", lambda part, **options: asked.update({part: options}) or [{"": "a row"}])
    monkeypatch.setattr(bench, "_start", lambda: [{"": "a row"}])
    assert bench.main(["--full", "--compiled", "--output", str(tmp_path)]) == 0
    names = {path.stem.removesuffix("-h200") for path in tmp_path.glob("*-h200.md")}
    assert names == {"memory-full", "designs"}
    record = (tmp_path / "designs-h200.md").read_text()
    assert "`python -m src.bench --full --compiled --output PATH`" in record
    assert str(tmp_path) not in record
    (cpu,) = {path.stem.removeprefix("start-") for path in tmp_path.glob("start-*.md")}
    names = {path.stem.removesuffix(f"-{cpu}") for path in tmp_path.glob(f"*-{cpu}.md")}
    assert names == {"start", "swap", "speed-full", "growth-full", "quality-full", "train-full"}
    assert asked["speed"] == {"full": True, "compiled": True, "openvino": None, "sdcpp": None}
    assert (asked["swap"], asked["designs"], asked["train"]) == ({}, {"compiled": True}, {"full": True, "script": None})


@pytest.mark.parametrize(("device", "named"), [("cpu", [False, False]), ("mps", [False, True]), ("cuda:0", [True, True])])
def test_a_report_is_named_after_the_card_that_torch_takes(device, named, monkeypatch) -> None:
    """Beside a torch for the CPU alone a card does nothing; of a Mac only the designs are timed on its GPU."""
    monkeypatch.setattr(devices, "detect_cards", lambda: [SimpleNamespace(name="GeForce")])
    monkeypatch.setattr(base_models, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(base_models, "name_of", lambda _: "GeForce")
    names = [device_name(bench.ON_CARD[part]) for part in ("memory", "designs")]
    assert [name in ("GeForce", "Apple GPU") for name in names] == named
    assert device_name() == device_name(bench.ON_CARD.get("speed", ()))


@pytest.mark.parametrize("error", [UserError("it fell over"), KeyboardInterrupt()])
def test_rows_that_were_measured_stay_when_the_next_fails(error, monkeypatch, tmp_path, capsys) -> None:
    def measure(part: str, **options: object) -> Iterator[dict[str, str]]:
        yield {"": "stock"}
        if not done:
            done.append(part)
            return
        raise error

    done: list[str] = []
    monkeypatch.setattr(bench, "_in_folder", measure)
    words = ["swap", "--output", str(tmp_path)]
    assert bench.main(words) == 0
    (whole,) = tmp_path.glob("*.md")
    before = whole.read_bytes()
    capsys.readouterr()
    assert bench.main(words) == (1 if isinstance(error, UserError) else ExitCode.INTERRUPTED)
    assert len(capsys.readouterr().err.splitlines()) == 1
    (kept,) = tmp_path.glob("swap-not-finished-*.md")
    assert "| stock |" in kept.read_text()
    assert whole.read_bytes() == before


def test_start_times_each_door_beside_a_bare_interpreter_and_a_run_beside_the_stock_script(
    monkeypatch, capsys, tmp_path
) -> None:
    monkeypatch.setattr(bench, "RUNS", 1)
    monkeypatch.setattr(bench, "DRAWINGS", 1)
    assert bench.main(["start", "--output", str(tmp_path)]) == 0
    (table,) = tmp_path.glob("start-*.md")
    rows = [row for row in json.loads(table.with_suffix(".json").read_bytes())["items"] if isinstance(row, dict)]
    assert len(rows) == 7
    assert all(row["ms"] > 0 for row in rows[:4])
    assert all(row["s"] > 0.5 for row in rows[4:])
    assert table.read_text().count("main.py") == 5 == capsys.readouterr().out.count("main.py")


def test_a_report_is_printed_and_written_with_what_it_was_measured_on(capsys, tmp_path) -> None:
    report = Report("speed", "python -m src.bench speed")
    report.add(["a remark", {"side": "stock", "next s": 9.876}, {"side": "ours", "next s": 123.4}, {"other": "x", "n": 3}])
    page = report.write(tmp_path)
    assert page.name == re.sub(r"[^a-z0-9]+", "-", f"speed-{device_name()}".lower()) + ".md"
    text = page.read_text()
    for line in (
        "`python -m src.bench speed`",
        "| side | next s |",
        "| --- | ---: |",
        "| stock | 9.88 |",
        "| ours | 123 |",
        "| x | 3 |",
    ):
        assert line in text.splitlines()
    assert device_name() in text
    content = json.loads(page.with_suffix(".json").read_bytes())
    assert content["items"][1] == {"side": "stock", "next s": 9.876}
    assert content["torch"] == torch.__version__
    assert [line.split() for line in capsys.readouterr().out.splitlines()][2:4] == [["side", "next", "s"], ["stock", "9.88"]]


def test_each_side_draws_in_a_process_of_its_own(tmp_path) -> None:
    model = pipelines.save(pipelines.sd1(), tmp_path / "model")
    found = sides.measure(sides.Drawing("ours", "fp32", str(model), 64, 1, batch_size=2))
    assert found.plan == "cpu"
    assert found.predicted_bytes > 0
    assert min(found.load_s, found.first_s, found.next_s) > 0
    assert found.peak_bytes > 10**8
    with pytest.raises(UserError, match=r"stock fp32 at 63 px failed: .*divisible by 8"):
        sides.measure(sides.Drawing("stock", "fp32", str(model), 63, 1))


def test_all_sides_draw_what_is_asked_for(tmp_path) -> None:
    model = str(pipelines.save(pipelines.sd1(), tmp_path / "model"))
    for precision in ("fp32", "bf16"):
        for load in (sides.load_stock, sides.load_ours):
            pictures = load(sides.Drawing("any", precision, model, 64, 1, batch_size=2))()
            assert [picture.size for picture in pictures] == [(64, 64)] * 2


def test_speeds_are_told_beside_the_stock_scripts(tmp_path, monkeypatch) -> None:
    """Medians of the rounds; the ratio is that of a picture in a warm process."""
    monkeypatch.setattr(speed.devices, "cpu_has_bf16", lambda: True)
    seconds = iter([8.0, 6.0, 4.0, 2.0] * 2 + [80.0, 60.0, 40.0, 20.0])
    monkeypatch.setattr(speed, "measure", lambda drawing, python: sides.Measured(1.0, 9.0, next(seconds), 3 * 10**9))
    rows = [row for row in speed.run(tmp_path, full=False) if isinstance(row, dict)]
    assert [row[""] for row in rows] == ["stock fp32", "stock bf16", "ours fp32", "ours bf16"]
    assert [row["next s"] for row in rows] == [8.0, 6.0, 4.0, 2.0]
    assert [row["times as fast"] for row in rows] == pytest.approx([1, 8 / 6, 2, 4])
    shutil.rmtree(tmp_path / "embedded")
    seconds = iter([1.0] * 18)
    rivals = [row[""] for row in speed.run(tmp_path, full=False, compiled=True, openvino=tmp_path) if isinstance(row, dict)]
    assert rivals == [side for side in speed.sides_of(True) if side != "stable-diffusion.cpp f16"]
    monkeypatch.setattr(speed.devices, "cpu_has_bf16", lambda: False)  # it would take hours
    monkeypatch.setattr(speed.devices, "cpu_vectors", lambda: "AVX2")
    shutil.rmtree(tmp_path / "embedded")
    seconds = iter([1.0] * 12)
    *rows, said = speed.run(tmp_path, full=False, compiled=True)
    assert [row[""] for row in rows if isinstance(row, dict)] == ["stock fp32", "compiled fp32", "ours fp32"]
    assert "not known to multiply bf16" in said


def test_on_a_card_each_row_of_the_budget_is_drawn_under_its_cap(tmp_path, monkeypatch) -> None:
    asked = []

    def measure(drawing: sides.Drawing) -> sides.Measured:
        asked.append(drawing)
        if drawing.max_vram_gb == 3:
            raise UserError("out of memory")
        return sides.Measured(1, 1, 2.5, 11 * memory.GIB // 10, memory.GIB, "group-offload")

    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(base_models, "pick_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(memory.random_models, "write", lambda model, name, precision: model.mkdir())
    rows = [row for row in memory.run(tmp_path, full=True) if isinstance(row, dict)]
    assert [drawing.max_vram_gb for drawing in asked] == [2, 3, 4, 6, 8, 2, 6, 4]
    assert [row["plan"] for row in rows] == ["group-offload", "out of memory", *["group-offload"] * 6]
    assert rows[0]["error"] == "+10%"


def test_growth_is_told_as_a_power(tmp_path, monkeypatch) -> None:
    found, held = {64: 1.0, 128: 4.0, 256: 64.0}, {64: 1000, 128: 1100, 256: 1700}
    monkeypatch.setattr(
        growth, "measure", lambda drawing: sides.Measured(1, 1, found[drawing.size_px], held[drawing.size_px], loaded_bytes=900)
    )
    drawings = {str(size): (size**2, sides.Drawing("ours", "fp32", "x", size, 1)) for size in found}
    rows = list(growth._rows("size", drawings, expected=1))
    assert [row["power"] for row in rows] == ["", pytest.approx(1), pytest.approx(2)]
    assert [row["its power"] for row in rows] == ["", 0.5, 1], "of what is beyond the model's 900 bytes"
    assert [row["at most 1 and 1"] for row in rows] == ["", "yes", "TOO FAST"]


def test_a_process_tells_its_own_peak_and_not_its_parents() -> None:
    held = torch.ones(1 << 27)  # half a gigabyte
    command = [sys.executable, "-c", "from src.bench.sides import peak_memory_bytes; print(peak_memory_bytes())"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT_FOLDER)
    assert 10**6 < int(done.stdout) < held.nbytes


def test_random_models_are_whole_and_have_the_shapes_of_their_names(tmp_path, monkeypatch) -> None:
    """Of tiny architectures, for the real ones take gigabytes; each is loaded and draws."""
    for name, make in (("sd15", pipelines.sd1), ("sdxl", pipelines.sdxl)):
        for weights in pipelines.save(make(), tmp_path / "shapes" / name).rglob("*.safetensors"):
            weights.unlink()
        monkeypatch.setattr(random_models, "ARCHITECTURES", tmp_path / "shapes")
        model = random_models.write(tmp_path / name, name, "bf16")
        (picture,) = sides.load_ours(sides.Drawing("ours", "bf16", str(model), 64, 1))()
        assert picture.size == (64, 64)
        assert picture.getextrema() != ((0, 0),) * 3


def test_each_option_is_told_beside_plain(tmp_path, monkeypatch) -> None:
    """The settings reach the pictures, the timed ones come after a plain one, a difference is the mean of the levels'."""
    monkeypatch.setattr(quality, "STEPS", 6)
    monkeypatch.setattr(quality, "TIMED", 1)
    texts, calls = quality.prompts()[:2], []
    monkeypatch.setattr(quality, "prompts", lambda: texts)
    draw = TextToImageGenerator.generate
    monkeypatch.setattr(TextToImageGenerator, "generate", lambda *args, **named: calls.append(named) or draw(*args, **named))
    _, *rows = quality.run(tmp_path, full=False)
    assert [row[""] for row in rows] == list(quality.OPTIONS)
    assert rows[0]["difference"] == 0
    assert all(row["difference"] > 0 for row in rows[1:])
    drawn = [(named["seed"], named.get("deep_cache", 1)) for named in calls if named["num_inference_steps"] != 2]
    told = [1, 1, 1, 2, 3, 5, 1, 1, 1, 1, 1, 2]
    assert [value for seed, value in drawn if seed == 1] == [1, *told]
    assert [value for seed, value in drawn if seed == 0] == [1, *(value for own in told for value in (1, own))]
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
        "import os, sys, time\n"
        "assert os.environ['ACCELERATE_USE_CPU'] == 'true'\n"
        "assert '--resolution=64' in sys.argv and '--mixed_precision=bf16' in sys.argv, sys.argv\n"
        "for step in range(7):\n"
        "    sys.stderr.write(f'\\rSteps:  1%| | {step}/6 [00:00<00:00,  1it/s, loss=0.1]'); sys.stderr.flush(); time.sleep(0.05)\n"
    )
    (seconds,) = train._time_script(train.Setting("m", 64, 1, "bf16", steps=6), tmp_path, script, tmp_path / "out")
    assert 0.04 < seconds < 0.2
    script.write_text("import sys; sys.exit('torchvision is missing')")
    with pytest.raises(UserError, match="torchvision is missing"):
        train._time_script(train.Setting("m", 64, 1, "no", steps=6), tmp_path, script, tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_stable_diffusion_cpp_is_timed_by_what_it_prints(tmp_path) -> None:
    program, drawing = tmp_path / "sd-cli", sides.Drawing("stable-diffusion.cpp", "f16", "folder", 512, 20)
    said = "[INFO ] model.cpp:993  - loading tensors completed, taking 2.64s (read: 0.96s)\n[INFO ] x - generate_image completed in 96.07s\n"
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\nprintf '{said}'\n")
    program.chmod(0o755)
    measured = sdcpp_side.measure(drawing, program)
    assert (measured.load_s, measured.first_s, measured.next_s) == (2.64, 96.07, 96.07)
    ballast = bytearray(b"x" * 300_000_000)  # what this process held must not count
    again = sdcpp_side.measure(drawing, program)
    del ballast
    assert max(measured.peak_bytes, again.peak_bytes) < 50_000_000
    asked = (tmp_path / "asked").read_text()
    assert all(words in asked for words in ("-m folder", "-W 512", "-H 512", "--steps 20", "--cfg-scale 7.5", "--type f16"))
    program.write_text("#!/bin/sh\necho no such model\nexit 1\n")
    with pytest.raises(UserError, match="sd-cli failed: no such model"):
        sdcpp_side.measure(drawing, program)
    with pytest.raises(UserError, match=r"none failed: .*No such file"):
        sdcpp_side.measure(drawing, tmp_path / "none")
    with pytest.raises(UserError, match="--sdcpp needs --full"):
        list(speed.run(tmp_path, full=False, sdcpp=program))


def test_designs_are_timed_with_their_counted_work(tmp_path, monkeypatch) -> None:
    tiny = {"channels": (32, 64), "head_width": 8, "batch_size": 2}
    monkeypatch.setattr(designs, "DESIGNS", {"narrow": ((4, 8), tiny), "wide": ((4, 8), tiny | {"channels": (64, 128)})})
    narrow, wide = (row for row in designs.run(tmp_path) if isinstance(row, dict))
    assert (narrow[""], wide[""]) == ("narrow", "wide")
    assert 3 < wide["GFLOP forward"] / narrow["GFLOP forward"] < 5  # twice as wide: about four times the products
    assert 3 < wide["M parameters"] / narrow["M parameters"] < 5
    assert narrow["samples an hour"] == pytest.approx(3_600_000 / narrow["ms a sample"], rel=0.01)
    assert narrow["TFLOP/s"] == pytest.approx(3 * narrow["GFLOP forward"] / narrow["ms a sample"], rel=0.01)


def test_commands_on_record_name_no_paths() -> None:
    assert list(map(bench._shown, ["speed", "--full", "--openvino=/home/bob/python", "/home/bob/x.py"])) == [
        "speed", "--full", "--openvino=PATH", "PATH",
    ]  # fmt: skip
