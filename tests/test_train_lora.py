"""The trainer's door: whole small trainings of every kind, resuming, and one line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from src import base_models, devices, train_lora
from src.config import AppConfig
from src.errors import ExitCode
from src.generator import TextToImageGenerator
from src.train_arguments import apply_typed
from src.train_config import TrainConfig, TrainRun
from src.training import latent_cache, trainer
from src.training.samples import as_drawn
from tests.tiny import training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: training.model(folder / f"tiny-{kind}", kind) for kind in ("sd1", "sdxl")}


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any(line.startswith("Traceback") for line in lines)
    return lines[-1]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd1", ("--targets", "conv", "--dora", "--format", "kohya")),
        ("sd1", ("--train_text_encoder", "--gradient_checkpointing", "--text_encoder_lr", "1e-3", "--alpha", "2")),
        ("sdxl", ("--train_text_encoder", "--format", "kohya", "--rslora")),
        (
            "sdxl",
            ("--targets", "kohya", "--optimizer", "prodigy", "--lr", "1", "--flip", "--batch_size", "2", "--ema_decay", "0.9"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:30],
)
def test_what_was_trained_is_what_the_generator_draws(
    family: str, settings: tuple[str, ...], data: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """Every file that comes out is loaded by the generator and draws the same picture, and not the base model's."""
    output = tmp_path / "out"
    assert training.run(data, models[family], output, "--max_steps", "4", "--lr", "1e-2", "--name", "sks", *settings) == 0
    config = AppConfig()
    config.model.model_id, config.model.precision = str(models[family]), "fp32"
    generator = TextToImageGenerator(config)
    options = {"seed": 1, "num_inference_steps": 2, "width": 64, "height": 64}
    base = generator.generate("sks", **options)[0].tobytes()
    pictures = []
    paths = [output / "final", *([output / "final" / "sks.safetensors"] if "--format" in settings else [])]
    for path in paths:
        report = generator.load_lora_weights(path)
        assert report.matched == report.total > 0
        pictures.append(generator.generate("sks", **options)[0])
        generator.unload_lora_weights()
    assert pictures[0].tobytes() != base
    for picture in pictures[1:]:
        assert max(abs(one - other) for one, other in zip(pictures[0].tobytes(), picture.tobytes())) <= 1


def test_a_resumed_run_ends_with_the_same_bits(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    common = ("--checkpoint_steps", "2", "--dropout", "0.1", "--ema_decay", "0.9", "--gradient_accumulation", "3")
    assert training.run(data, models["sd1"], tmp_path / "whole", "--max_steps", "6", *common) == 0
    assert training.run(data, models["sd1"], tmp_path / "cut", "--max_steps", "2", *common) == 0
    assert training.resume(data, tmp_path / "cut", "--max_steps", "6") == 0
    whole, cut = (training.state(tmp_path / name / "checkpoint-6") for name in ("whole", "cut"))
    assert training.equal(whole, cut)
    assert not training.equal(whole, training.state(tmp_path / "cut" / "checkpoint-2"))
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "cut")]
    losses = [[json.loads(line)["loss"] for line in log.splitlines() if '"train"' in line] for log in logs]
    assert losses[0][-1] == losses[1][-1]
    assert re.search("<td>cpu, (fp32|bf16)</td>", (tmp_path / "whole" / "report.html").read_text(encoding="utf-8"))


def test_a_changed_setting_is_named_and_force_goes_on(data: Path, models: dict[str, Path], tmp_path: Path, capsys) -> None:
    assert training.run(data, models["sd1"], tmp_path / "out", "--max_steps", "2") == 0
    assert training.resume(data, tmp_path / "out", "--max_steps", "3", "--weight_decay", "0", "--lr", "0.01") == ExitCode.USAGE
    error = last_error(capsys)
    assert "train.weight_decay 0.01 -> 0.0" in error
    assert "train.learning_rate 0.0001 -> 0.01" in error
    for fixed in (("--optimizer", "prodigy"), ("--rank", "8"), ("--targets", "conv")):
        assert training.resume(data, tmp_path / "out", "--max_steps", "3", *fixed, "--force") == ExitCode.USAGE
        assert "cannot go on from checkpoint-2" in last_error(capsys)
    assert training.resume(data, tmp_path / "out", "--max_steps", "3", "--lr", "0.01", "--ema_decay", "0.5", "--force") == 0
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [item["lr"] for item in log if item["kind"] == "train"] == [1e-4, 0.01]
    assert any(name.startswith("average/") for name in training.state(tmp_path / "out" / "checkpoint-3"))


def test_changed_pictures_are_named(models: dict[str, Path], tmp_path: Path, capsys) -> None:
    data = training.photos(tmp_path / "data")
    assert training.run(data, models["sd1"], tmp_path / "out", "--max_steps", "2") == 0
    (data / "0000.txt").write_text("another caption")
    assert training.resume(data, tmp_path / "out", "--max_steps", "4") == ExitCode.USAGE
    assert "the pictures or captions changed" in last_error(capsys)
    assert training.resume(data, tmp_path / "out", "--max_steps", "3", "--force") == 0


def test_a_folder_with_a_training_is_not_written_over(data: Path, models: dict[str, Path], tmp_path: Path, capsys) -> None:
    assert training.run(data, models["sd1"], tmp_path / "out", "--max_steps", "1") == 0
    before = training.state(tmp_path / "out" / "checkpoint-1")
    assert training.run(data, models["sd1"], tmp_path / "out", "--max_steps", "1") == ExitCode.USAGE
    assert "--resume goes on with it" in last_error(capsys)
    assert training.equal(before, training.state(tmp_path / "out" / "checkpoint-1"))
    assert training.resume(data, tmp_path / "out") == ExitCode.OK
    assert "all 1 steps are done" in last_error(capsys)
    assert training.resume(data, tmp_path / "out", "--format", "kohya") == ExitCode.OK  # the result once more, also for A1111
    names = {path.suffix for path in (tmp_path / "out" / "final").iterdir()}
    assert ".safetensors" in names


def test_an_adapter_without_its_checkpoints_is_not_written_over(
    data: Path, models: dict[str, Path], tmp_path: Path, capsys
) -> None:
    output = tmp_path / "out"
    assert training.run(data, models["sd1"], output, "--max_steps", "1", "--lr_scheduler", "cosine") == 0
    capsys.readouterr()
    assert training.resume(data, output) == ExitCode.OK
    assert "--max_steps N --force" in last_error(capsys)
    shutil.rmtree(output / "checkpoint-1")
    before = (output / "final" / "manifest.json").read_bytes()
    assert training.run(data, models["sd1"], output, "--max_steps", "1", "--seed", "9") == ExitCode.USAGE
    assert "holds an adapter (final and best)" in last_error(capsys)
    assert (output / "final" / "manifest.json").read_bytes() == before


def test_a_disk_without_room_for_a_checkpoint_is_said_before_the_first_step(
    data: Path, models: dict[str, Path], tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (2**30, 2**30, 1000))
    assert training.run(data, models["sd1"], tmp_path / "out", "--max_steps", "1") == ExitCode.FAILURE
    assert "free some space" in last_error(capsys)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_without_a_trigger_the_commonest_caption_is_drawn(models: dict[str, Path], tmp_path: Path, capsys) -> None:
    """kohya's folders: visits and prompt are read from their names, and stand in the headers that A1111 shows."""
    training.photos(tmp_path / "data" / "3_sks dog", 2)
    for text in (tmp_path / "data").rglob("*.txt"):
        text.unlink()
    training.photos(tmp_path / "data" / "1_dog", 1)
    arguments = ("--max_steps", "1", "--format", "kohya", "--set", "train.sample_inference_steps=1")
    assert training.run(tmp_path / "data", models["sd1"], tmp_path / "out", *arguments) == 0
    assert "draw    python main.py 'sks dog' --lora" in last_error(capsys)
    (file,) = set((tmp_path / "out" / "final").glob("*.safetensors")) - {
        tmp_path / "out/final/pytorch_lora_weights.safetensors"
    }
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    assert json.loads(facts["ss_dataset_dirs"]) == {
        "3_sks dog": {"n_repeats": 3, "img_count": 2}, "1_dog": {"n_repeats": 1, "img_count": 1}
    }  # fmt: skip
    assert facts["ss_num_train_images"] == "7"


def test_old_checkpoints_go_and_the_best_stays(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("--max_steps", "8", "--checkpoint_steps", "1", "--keep", "2", "--validation_every", "2", "--lr", "1")
    assert training.run(data, models["sd1"], tmp_path / "out", *arguments) == 0
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = {item["step"]: item["loss"] for item in log if item["kind"] == "validation" and item["step"]}
    best = json.loads((tmp_path / "out" / "best" / "manifest.json").read_text())["facts"]["best_of"]
    left = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert {"checkpoint-7", "checkpoint-8", best} == left
    assert losses[int(best.split("-")[1])] == min(losses.values())


def test_the_class_is_drawn_by_the_model_and_trained_beside(
    data: Path, models: dict[str, Path], tmp_path: Path, capsys
) -> None:
    arguments = ("--max_steps", "2", "--class_prompt", "a {red|green} thing", "--num_class_images", "3",
                 "--set", "train.sample_inference_steps=2")  # fmt: skip
    assert training.run(data, models["sd1"], tmp_path / "out", *arguments) == 0
    drawn = sorted((tmp_path / "out" / "class").glob("*.png"))
    assert len(drawn) == 3
    assert {path.with_suffix(".txt").read_text() for path in drawn} <= {"a red thing", "a green thing"}
    assert "4 pictures, 3 of the class" in capsys.readouterr().err
    before = drawn[0].read_bytes()
    drawn[0].unlink()
    assert training.resume(data, tmp_path / "out", "--max_steps", "3") == 0
    assert drawn[0].read_bytes() == before
    drawn[0].with_suffix(".txt").write_text("a blue thing")
    assert training.resume(data, tmp_path / "out", "--max_steps", "4") == ExitCode.USAGE
    assert "the pictures or captions changed" in last_error(capsys)


def test_class_pictures_are_mirrored_too_and_there_is_room_for_all(
    data: Path, models: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    needed = []
    monkeypatch.setattr(latent_cache, "check_space", lambda folder, needed_bytes: needed.append(needed_bytes))
    arguments = ("--max_steps", "6", "--flip", "--class_prompt", "a thing", "--num_class_images", "3", "--no-samples")
    assert training.run(data, models["sd1"], tmp_path / "out", *arguments) == 0  # the sixth visit is to a mirrored one
    assert needed == [2 * (4 + 3) * 2048]  # mean and deviation of 4 x 8 x 8 numbers of 4 bytes


def test_settings_come_from_a_file_and_end_in_the_checkpoint(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  rank: 2\n  max_steps: 1\n  learning_rate: 1e-3\n")
    output = tmp_path / "out"
    assert training.run(data, models["sd1"], output, "--config", str(file), "--set", "train.alpha=3") == 0
    text = (output / "final" / "config.yaml").read_text()
    assert "rank: 2\n" in text
    assert "alpha: 3.0\n" in text
    assert "learning_rate: 0.001\n" in text
    settings = json.loads((output / "final" / "unet_lora" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 3)


def test_a_caption_that_becomes_the_sample_prompt_is_taken_literally() -> None:
    """Captions beside A1111's pictures name LoRAs, and may hold what would be a wildcard in a prompt."""
    caption = "a {red|blue} thing, __hue__ <lora:ink:0.8>"
    dataset = SimpleNamespace(trigger=None, train=[SimpleNamespace(captions=(caption,))])
    train = TrainConfig(sample_prompts=(trainer.usual_prompt(dataset),))
    assert as_drawn(train, Path("nowhere")) == ("a {red|blue} thing, __hue__",)
    dataset.trigger = "sks__{dog|cat}__"
    train.sample_prompts = (trainer.usual_prompt(dataset),)
    assert as_drawn(train, Path("nowhere")) == ("a photo of sks__{dog|cat}__",)


def test_a_flag_wins_over_the_length_that_a_file_sets(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  max_steps: 7\n")
    lengths = {}
    for name, typed in (
        ("flag", {"train.num_epochs": 3}), ("set", {"set": ["train.num_epochs=3"]}), ("neither", {}),
        ("both", {"set": ["train.num_epochs=3"], "train.max_steps": 5}), ("none", {"set": ["train.max_steps=null"]}),
    ):  # fmt: skip
        run = TrainRun()
        apply_typed(run, {"config": [str(file)], **typed})
        lengths[name] = (run.train.max_steps, run.train.num_epochs)
    assert lengths == {"flag": (None, 3), "set": (None, 3), "neither": (7, None), "both": (5, None), "none": (None, None)}


def test_a_resume_by_epochs_of_other_batches_does_not_stretch_the_curve(
    data: Path, models: dict[str, Path], tmp_path: Path, capsys, monkeypatch
) -> None:
    """As when half as many processes share the pictures: an epoch is twice as many steps then."""
    curve = ("--num_epochs", "1", "--lr_scheduler", "cosine", "--no-samples")
    assert training.run(data, models["sd1"], tmp_path / "out", *curve) == 0
    monkeypatch.setattr(trainer, "total_steps", lambda run, batches: 2 * batches)
    assert training.resume(data, tmp_path / "out") == ExitCode.USAGE
    assert "comes to 8 steps in place of 4" in last_error(capsys)
    assert training.resume(data, tmp_path / "out", "--force") == 0
    assert (tmp_path / "out" / "checkpoint-8").is_dir()


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("--rank", "0"), 2, "rank 0 is outside 1 to 1024"),
        (("--class_prompt", ""), 2, "--class_prompt is empty"),
        (("--max_steps", "5", "--config", "train/sd15-4g"), 4, "did you mean 'train/sd15-4gb'?"),
        (("--resolution", "500"), 2, "nearest: 496 or 504"),
        (("--lr", "fast"), 2, "--lr fast: expected a number"),
        (("--optimizer", "adam"), 2, "choose adamw, adamw8bit"),
        (("--max_steps", "5", "--num_epochs", "2"), 2, "exclude each other"),
        (("--max_steps", "5", "--lr_warmup_steps", "5"), 2, "lr_warmup_steps 5 is no less than the training's 5 steps"),
        (("--lr_warmup_steps", "1000"), 2, "would never be reached"),
        (("--max_steps", "1", "--sample_prompts", "a <lora:ink:1>"), 2, "<lora:ink> is not drawn with"),
        (("--dataset_dir", "nowhere"), 4, "nowhere: no such folder"),
        (("--model", "someone/not-cached", "--offline"), 4, "--offline"),
        (("--model", "./nowhere"), 4, "nowhere"),
        (("--sample_prompts", "nowhere.txt"), 4, "nowhere.txt"),
        (("--config", "nowhere.yaml"), 4, "nowhere.yaml"),
        (("--resume",), 4, "holds no whole checkpoint"),
        (("--zero_terminal_snr",), 2, "v-prediction"),
        (("--dora", "--quantize", "int8"), 2, "leave one out"),
        (("--set", "model.precision=fp16"), 2, "small gradients would vanish"),
        (("--keep", "1"), 2, "keep 1 is outside 2"),
        (("--mixed_precision", "fp16"), 2, "needs a graphics card"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], code: int, expected: str, data: Path, models: dict[str, Path], tmp_path: Path, capsys
) -> None:
    assert training.run(data, models["sd1"], tmp_path / "out", "--max_steps", "1", *arguments) == code \
        if arguments[0] != "--max_steps" else training.run(data, models["sd1"], tmp_path / "out", *arguments) == code  # fmt: skip
    error = last_error(capsys)
    assert expected in error
    assert error.startswith("error: ")
    assert not list((tmp_path / "out").glob("checkpoint-*")) if (tmp_path / "out").exists() else True


def test_broken_data_is_one_line(models: dict[str, Path], tmp_path: Path, capsys) -> None:
    def fails(name: str) -> str:
        assert training.run(tmp_path / name, models["sd1"], tmp_path / f"out-{name}", "--max_steps", "1") != 0
        return last_error(capsys)

    (tmp_path / "empty").mkdir()
    assert "empty" in fails("empty")
    training.photos(tmp_path / "blank", caption="")
    assert "caption" in fails("blank")
    damaged = training.photos(tmp_path / "damaged")
    data = (damaged / "0001.png").read_bytes()
    (damaged / "0001.png").write_bytes(data[: len(data) // 2])
    assert "0001.png" in fails("damaged")
    bytes_ = training.photos(tmp_path / "latin")
    (bytes_ / "0002.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "0002.txt" in fails("latin")


def test_a_picture_too_small_is_said(models: dict[str, Path], tmp_path: Path, capsys) -> None:
    data = training.photos(tmp_path / "data")
    Image.new("RGB", (40, 40), "red").save(data / "0000.png")
    assert training.run(data, models["sd1"], tmp_path / "out", "--max_steps", "1") == 0
    assert "smaller" in capsys.readouterr().err


def test_help_names_every_part(capsys) -> None:
    assert train_lora.main(["--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--dataset-dir", "--resume", "--snr-gamma", "--class-prompt", "--estimate-vram", "exit codes"):
        assert flag in text


def test_a_full_memory_keeps_the_checkpoints(data: Path, models: dict[str, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    from src.training import loop

    calls = []

    def full(*arguments):
        calls.append(1)
        if len(calls) >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(*arguments)

    original = loop.batch_loss
    monkeypatch.setattr(loop, "batch_loss", full)
    arguments = ("--max_steps", "9", "--checkpoint_steps", "2", "--no-gradient_checkpointing")
    assert training.run(data, models["sd1"], tmp_path / "out", *arguments) == ExitCode.OUT_OF_MEMORY
    assert "step 4, resolution 64, batch size 1, rank 4); use --gradient_checkpointing" in last_error(capsys)
    assert training.state(tmp_path / "out" / "checkpoint-2")
    monkeypatch.undo()
    assert training.resume(data, tmp_path / "out", "--gradient_checkpointing") == 0


def test_what_is_free_is_asked_before_the_model_takes_its_part(
    data: Path, models: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    order = []
    load, ask = base_models.load, devices.available_memory_bytes
    monkeypatch.setattr(base_models, "load", lambda *given, **named: order.append("load") or load(*given, **named))
    monkeypatch.setattr(devices, "available_memory_bytes", lambda: order.append("ask") or ask())
    assert training.run(data, models["sd1"], tmp_path / "out", "--max_steps", "1") == 0
    assert order == ["ask", "load"]


def test_a_stop_that_another_process_was_told_of_is_a_stop(
    data: Path, models: dict[str, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    from src.training import loop

    answers = iter([False, True])
    monkeypatch.setattr(loop, "_is_stopped", lambda job, stop: next(answers))
    output = tmp_path / "with space"
    assert training.run(data, models["sd1"], output, "--max_steps", "5") == ExitCode.INTERRUPTED
    assert (
        f"stopped after step 1; to go on: python -m src.train_lora --dataset_dir {data} --output_dir '{output}' --resume"
        in (capsys.readouterr().err)
    )
    assert (output / "checkpoint-1").is_dir()
    assert not (output / "final").exists()


def test_the_tracker_gets_the_losses(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    assert training.run(data, models["sd1"], tmp_path / "out", "--max_steps", "2", "--tracker", "tensorboard") == 0
    assert list((tmp_path / "out" / "tracker").rglob("events.out.tfevents*"))
