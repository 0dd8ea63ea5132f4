"""The door of fine-tuning: whole small trainings, exactly the part that was asked for, resuming, and one line for mistakes."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from src import files, finetune, training_start
from src.buckets import place
from src.config import AppConfig
from src.dataset import Example, load_picture, read_dataset
from src.errors import ExitCode
from src.finetune_config import FinetuneConfig, FinetuneRun
from src.generator import TextToImageGenerator
from src.prepared_folder import Origin
from src.training.batches import Feeder, versions_of
from src.training.latent_cache import Latents
from src.training.text_cache import Text, time_ids
from tests import original_layout
from tests.tiny import finetuning, pipelines, training
from tests.tiny.faults import in_child

# What each part holds, by the names of diffusers' modules; written down a second time, by hand.
EXPECTED = {
    "all": lambda name: True,
    "cross-attention": lambda name: "attn2" in name.split("."),
    "mid": lambda name: name.split(".")[0] == "mid_block",
    "last-blocks": lambda name: (
        name.split(".")[0] in ("conv_norm_out", "conv_out") or name.split(".")[:2] in (["up_blocks", "0"], ["up_blocks", "1"])
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: finetuning.model(folder / f"tiny-{kind}", kind) for kind in ("sd1", "sdxl")}


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any(line.startswith("Traceback") for line in lines)
    return lines[-1]


@pytest.mark.parametrize("part", list(EXPECTED))
def test_each_part_changes_exactly_what_it_names(part: str, data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    settings = (
        "--max_steps",
        "2",
        "--lr",
        "1e-2",
        "--weight_decay",
        "1",
        "--mixed_precision",
        "bf16",
        "--no-samples",
        "--gradient_accumulation",
        "1",
    )
    assert finetuning.run(data, models["sd1"], tmp_path / "out", "--train", part, *settings) == 0
    before, after = finetuning.unet(models["sd1"]), finetuning.unet(tmp_path / "out" / "final")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if EXPECTED[part](name)}
    for path in sorted(models["sd1"].rglob("*.safetensors")):  # everything else as it was, bit for bit
        if path.parent.name != "unet":
            one, other = (
                safetensors.torch.load_file(folder / path.relative_to(models["sd1"]))
                for folder in (models["sd1"], tmp_path / "out" / "final")
            )
            strip = lambda names: {name.removeprefix("text_model."): tensor for name, tensor in names.items()}  # noqa: E731
            assert training.equal(strip(one), strip(other)), path


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_model_is_loaded_by_diffusers_and_by_the_generator(
    kind: str, data: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """Both draw the same with it, which is not what the base model draws; and a training may start from it."""
    settings = ("--max_steps", "3", "--lr", "1e-2", "--mixed_precision", "bf16", "--flip", "--ema_decay", "none",
                "--gradient_checkpointing", "--gradient_accumulation", "1")  # fmt: skip
    assert finetuning.run(data, models[kind], tmp_path / "out", *settings) == 0
    final = tmp_path / "out" / "final"
    drawn = {}
    for name, folder in {"base": models[kind], "final": final}.items():
        config = AppConfig()
        config.model.model_id, config.model.precision = str(folder), "fp32"
        drawn[name] = (
            TextToImageGenerator(config).generate("sks", seed=1, num_inference_steps=2, width=64, height=64)[0].tobytes()
        )
    assert drawn["base"] != drawn["final"]
    pipeline = (StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline).from_pretrained(final)
    ours = safetensors.torch.load_file(final / "text_encoder" / "model.safetensors")
    live = {f"text_model.{name}": tensor for name, tensor in pipeline.text_encoder.state_dict().items()}
    assert all(torch.equal(live[name], tensor.float()) for name, tensor in ours.items())
    assert all(tensor.dtype == torch.float16 for tensor in finetuning.unet(final).values())
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    picture = pipeline("sks", num_inference_steps=2, guidance_scale=7.5, latents=noise, width=64, height=64).images[0].tobytes()
    assert max(abs(one - other) for one, other in zip(picture, drawn["final"])) <= 2
    assert finetuning.run(data, final, tmp_path / "again", "--max_steps", "1", "--train", "mid", "--no-samples") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_base_of_finer_numbers_is_rounded_and_that_is_said_once(
    dtype: torch.dtype, data: Path, tmp_path: Path, capsys
) -> None:
    """From its own numbers, and not from those of the bf16 that it is computed in."""
    base = pipelines.save(pipelines.sd1().to(dtype), tmp_path / "base")
    tensors = finetuning.unet(base)
    tensors["conv_in.bias"] = torch.full_like(tensors["conv_in.bias"], 1e-7)  # among fp16's last steps, of 6e-8
    safetensors.torch.save_file(tensors, base / finetuning.UNET, {"format": "pt"})
    settings = ("--max_steps", "1", "--train", "mid", "--mixed_precision", "bf16", "--no-samples", "--validation_every", "2")
    assert finetuning.run(data, base, tmp_path / "out", *settings) == 0
    said = capsys.readouterr().err
    assert said.count("the unet is stored finer than fp16; what did not learn is saved rounded to fp16") == 1
    assert said.count("the vae is stored finer than fp16") == 1
    after = finetuning.unet(tmp_path / "out" / "final")
    assert (tmp_path / "out" / "best").is_dir()
    kept = [name for name in after if not name.startswith("mid_block.")]
    assert all(torch.equal(tensors[name].half(), after[name]) for name in kept)
    assert not torch.equal(tensors["conv_in.bias"], after["conv_in.bias"].to(dtype))


def test_a_single_file_becomes_a_model_folder(data: Path, models: dict[str, Path], tmp_path: Path, capsys) -> None:
    """What did not learn is read again from the original layout, and has its very bits."""
    base = StableDiffusionPipeline.from_pretrained(models["sd1"], torch_dtype=torch.float16)
    file = original_layout.write(tmp_path / "tiny.safetensors", base)
    settings = ("--set", f"model.architecture={models['sd1']}", "--max_steps", "1", "--train", "mid", "--mixed_precision", "bf16", "--no-samples")  # fmt: skip
    assert finetuning.run(data, file, tmp_path / "out", *settings) == 0
    assert "finer than fp16" not in capsys.readouterr().err
    before, after = finetuning.unet(models["sd1"]), finetuning.unet(tmp_path / "out" / "final")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("mid_block."))


def test_a_killed_run_goes_on_with_the_same_bits(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Killed while its second checkpoint is being written, file by file."""
    common = ("--max_steps", "2", "--checkpoint_steps", "1", "--train", "mid", "--no-samples", "--gradient_accumulation", "1")
    assert finetuning.run(data, models["sd1"], tmp_path / "whole", *common) == 0

    def killed() -> None:
        real, calls = files.write_flushed, []

        def write(path: Path, content: bytes | files.Stream) -> None:
            calls.append(path.name)
            if calls.count("optimizer.safetensors") == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, content)

        files.write_flushed = write
        finetuning.run(data, models["sd1"], tmp_path / "cut", *common)

    torch.set_num_threads(1)
    assert in_child(killed) == -signal.SIGKILL
    assert not (tmp_path / "cut" / "checkpoint-2").exists()
    assert finetuning.resume(data, tmp_path / "cut") == 0
    assert training.equal(*(training.state(tmp_path / run / "checkpoint-2") for run in ("whole", "cut")))
    assert training.equal(*(finetuning.unet(tmp_path / run / "final") for run in ("whole", "cut")))


def test_a_resumed_run_ends_with_the_same_bits(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    common = ("--checkpoint_steps", "2", "--keep", "9", "--crop", "0.2", "--colour", "0.3", "--flip", "--lr_scheduler", "constant", "--lr_warmup_steps", "2", "--no-samples")  # fmt: skip
    assert finetuning.run(data, models["sd1"], tmp_path / "whole", "--max_steps", "4", *common) == 0
    assert finetuning.run(data, models["sd1"], tmp_path / "cut", "--max_steps", "3", *common) == 0
    assert finetuning.resume(data, tmp_path / "cut", "--max_steps", "4") == 0
    whole, cut = (training.state(tmp_path / name / "checkpoint-4") for name in ("whole", "cut"))
    assert {name.split("/")[0] for name in whole} == {"weights", "average", "optimizer"}
    assert training.equal(whole, cut)
    assert not training.equal(whole, training.state(tmp_path / "cut" / "checkpoint-3"))
    for name in ("final", "best"):
        assert training.equal(*(finetuning.unet(tmp_path / run / name) for run in ("whole", "cut")))


def test_what_is_saved_is_the_average(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """By its closed form: after n steps, the weights of step i (0: the base's) in the shares that the decays leave."""
    settings = ("--max_steps", "3", "--checkpoint_steps", "1", "--keep", "9", "--lr", "1e-2", "--ema_decay", "0.3", "--train", "mid", "--no-samples")  # fmt: skip
    assert finetuning.run(data, models["sd1"], tmp_path / "out", *settings) == 0
    states = [training.state(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2, 3)]
    decays = [min(0.3, (1 + step) / (10 + step)) for step in (1, 2, 3)]
    shares = [math.prod(decays), *((1 - decay) * math.prod(decays[index + 1 :]) for index, decay in enumerate(decays))]
    assert sum(shares) == pytest.approx(1)
    base, final = finetuning.unet(models["sd1"]), finetuning.unet(tmp_path / "out" / "final")
    for name in [name for name in base if name.startswith("mid_block.")]:
        live = [base[name].float(), *(state[f"weights/unet.{name}"] for state in states)]
        expected = sum(share * tensor for share, tensor in zip(shares, live))
        torch.testing.assert_close(states[-1][f"average/unet.{name}"], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(final[name], states[-1][f"average/unet.{name}"].half())


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """A twentieth of 40 steps is 2; then lr / 2 (1 + cos(pi progress))."""
    assert finetuning.run(data, models["sd1"], tmp_path / "out", "--max_steps", "40", "--lr", "0.01", "--train", "mid", "--no-samples",
                          "--gradient_accumulation", "1") == 0  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    rates = {item["step"]: item["lr"] for item in log if item["kind"] == "train"}
    assert len(rates) == 8
    for step, rate in rates.items():
        assert rate == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * (step - 1 - 2) / 38)))
    assert "lr_warmup_steps: 2\n" in (tmp_path / "out" / "final" / "config.yaml").read_text()


def test_a_bf16_training_goes_on(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """How the model is loaded, in fp32, is no setting that a resume could find in contradiction to bf16."""
    settings = ("--mixed_precision", "bf16", "--train", "mid", "--no-samples", "--lr_scheduler", "constant")
    assert finetuning.run(data, models["sd1"], tmp_path / "out", *settings, "--max_steps", "1") == 0
    assert finetuning.resume(data, tmp_path / "out", "--max_steps", "2") == 0
    stored = json.loads((tmp_path / "out" / "checkpoint-2" / "manifest.json").read_text())["facts"]["run"]
    assert (stored["model"]["precision"], stored["model"]["device"]) == ("bf16", "cpu")
    stored["model"]["precision"] = "fp32"  # as the first versions had it
    before = training_start.stored_run(SimpleNamespace(facts={"run": stored}, folder=tmp_path), FinetuneRun)
    assert before.model.precision == "bf16"


def test_bf16_keeps_master_weights(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """A step of 1e-6 is far below the last bit of a bf16 weight, and arrives all the same."""
    settings = ("--max_steps", "1", "--lr", "1e-6", "--mixed_precision", "bf16", "--ema_decay", "none", "--weight_decay", "0", "--lr_scheduler", "constant",
                "--lr_warmup_steps", "0", "--no-samples", "--gradient_accumulation", "1")  # fmt: skip
    assert finetuning.run(data, models["sd1"], tmp_path / "out", *settings) == 0
    base = finetuning.unet(models["sd1"])
    state = training.state(tmp_path / "out" / "checkpoint-1")
    moves = {name: (state[f"weights/unet.{name}"] - base[name].float()).abs().max().item() for name in base}
    assert all(tensor.dtype == torch.float32 for name, tensor in state.items() if name.startswith("weights/"))
    assert min(moves.values()) > 0
    assert max(moves.values()) < 2e-6  # Adam's first step is the learning rate, whatever the gradient


@pytest.mark.parametrize("style", ["pipe", "comma"])
def test_a_table_of_captions(style: str, models: dict[str, Path], tmp_path: Path, capsys) -> None:
    """Flickr30k's and Flickr8k's form; with all captions, an epoch holds every pair once."""
    folder = finetuning.flickr(tmp_path / "flickr", 4, style)
    settings = ("--num_epochs", "1", "--captions", "all", "--gradient_accumulation", "1", "--train", "mid", "--no-samples")
    assert finetuning.run(folder, models["sd1"], tmp_path / "out", *settings) == 0
    said = capsys.readouterr().err
    assert "12 of 4 pictures" in said
    assert "12 steps of 1 picture, 12 batches an epoch" in said
    assert (tmp_path / "out" / "checkpoint-12").is_dir()


def test_versions_are_encoded_once_and_all_are_learnt(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Four pictures in three versions, each mirrored, too; and a visit draws any of them."""
    settings = ("--max_steps", "1", "--train", "mid", "--crop", "0.3", "--versions", "3", "--flip", "--no-samples")
    assert finetuning.run(data, models["sd1"], tmp_path / "out", *settings) == 0
    files = [safetensors.torch.load_file(path) for path in (tmp_path / "cache" / "training").rglob("*.safetensors")]
    means = [tensors["mean"] for tensors in files if "mean" in tensors]
    assert len(means) == 24
    assert len({tuple(mean.flatten().tolist()) for mean in means}) > 20  # a cut of less than a pixel is none

    train = FinetuneConfig(crop=0.3, versions=3)
    found = read_dataset(data, training.SIZE_PX, step_px=16, buckets=False, validation_every=0)
    asked = []
    latents = SimpleNamespace(
        get=lambda example, flip: asked.append(example.version) or Latents(torch.zeros(4, 8, 8), torch.zeros(4, 8, 8))
    )
    texts = SimpleNamespace(chunks=lambda caption: 1, get=lambda caption, chunks: Text(torch.zeros(77, 32)))
    feeder = Feeder(found, (), latents, texts, train, timestep_count=1000)
    for index in range(60):
        feeder.batch(index)
    assert len(set(asked)) == 1 + 4 * 2


def test_a_batch_tells_of_mirrored_pictures_that_they_are(data: Path) -> None:
    found = read_dataset(data, training.SIZE_PX, step_px=16, buckets=False, validation_every=0)
    found = replace(found, train=tuple(replace(item, crop_right=7) for item in found.train))
    zeros = torch.zeros(4, 8, 8)
    latents = SimpleNamespace(get=lambda example, flip: Latents(zeros + flip, zeros))  # a mirrored one is all ones
    texts = SimpleNamespace(chunks=lambda caption: 1, get=lambda caption, chunks: Text(torch.zeros(77, 32)))
    feeder = Feeder(found, (), latents, texts, FinetuneConfig(flip=True, versions=1), timestep_count=1000, is_sdxl=True)
    batches = [feeder.batch(index) for index in range(20)]
    assert {(batch.latents[0, 0, 0, 0].item(), batch.time_ids[0, 3].item()) for batch in batches} == {(0, 0), (1, 7)}


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("prepared", [False, True])
def test_sdxl_is_told_where_the_cut_of_a_version_lies(turned: bool, prepared: bool, tmp_path: Path) -> None:
    """Read from the pixels: each one's red is its place in the original, and a line through a row begins at the cut.

    The picture is 120 long, trained in a square of 64; prepared: it is the middle part of an original of 190.
    """
    before, long_px = (30, 190) if prepared else (0, 120)
    row = bytes(value for place in range(before, before + 120) for value in (place, 0, 0))
    image = Image.frombytes("RGB", (120, 1), row).resize((120, 64))
    turn = (lambda pair: (pair[1], pair[0])) if turned else (lambda pair: pair)
    path = tmp_path / "a.png"
    (image.transpose(Image.Transpose.TRANSPOSE) if turned else image).save(path)
    origin = Origin(turn((120, 64)), turn((long_px, 64)), turn((float(before), 0.0)), 1.0, 1) if prepared else None
    whole = Example(path, ("",), **place(turn((120, 64)), [(64, 64)], origin), sha256="0" * 64)
    shares = []
    for example in versions_of(whole, FinetuneConfig(crop=0.4, versions=9)):
        kept = example.version.kept if example.version else 1.0
        shares.append(kept)
        for mirrored in (False, True):
            top, left = time_ids(example, mirrored)[2:4].tolist()
            picture = load_picture(example, mirrored)
            seen = numpy.asarray(picture.transpose(Image.Transpose.TRANSPOSE) if turned else picture)[32, 8:-8, 0]
            slope, start = numpy.polyfit(numpy.arange(8, 56) + 0.5, seen + 0.5, 1)
            assert abs(slope) == pytest.approx(kept, abs=0.02)
            corner = start if slope > 0 else long_px - start
            assert (top if turned else left) == pytest.approx(corner / kept, abs=2.5)  # cut at whole pixels, and enlarged
    assert min(shares) < 0.75


def test_held_out_pictures_are_judged_at_fixed_noise_and_not_too_many(models: dict[str, Path], tmp_path: Path, capsys) -> None:
    data = training.photos(tmp_path / "photos", 9)
    settings = ("--max_steps", "2", "--checkpoint_steps", "1", "--train", "mid", "--validation_every", "2", "--validation_pictures", "3", "--no-samples")  # fmt: skip
    assert finetuning.run(data, models["sd1"], tmp_path / "one", *settings, "--lr", "1e-12") == 0
    assert "6 pictures, 3 held out" in capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    losses = [item["loss"] for item in log if item["kind"] == "validation"]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(losses[-1], rel=1e-5)
    assert "Validation loss" in (tmp_path / "one" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("--train", "unet"), 2, "choose all, cross-attention"),
        (("--set", "train.rank=4"), 2, "unknown setting 'train.rank'"),
        (("--versions", "3"), 2, "no effect without --crop or --colour"),
        (("--crop", "0.9"), 2, "crop 0.9 is outside 0 to 0.5"),
        (("--lr_warmup_steps", "9"), 2, "would never be reached"),
        (("--set", "train.max_steps=null", "--lr_warmup_steps", "1000"), 2, "would never be reached"),
        (("--captions_file", "nowhere.csv"), 4, "nowhere.csv"),
        (("--set", "model.precision=fp32", "--mixed_precision", "bf16"), 2, "has no effect"),
        (("--dataset_dir", "nowhere"), 4, "nowhere: no such folder"),
        (("--resume",), 4, "holds no whole checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(
    arguments, code: int, expected: str, data: Path, models: dict[str, Path], tmp_path: Path, capsys
) -> None:
    assert finetuning.run(data, models["sd1"], tmp_path / "out", "--max_steps", "1", *arguments) == code
    assert expected in last_error(capsys)


def test_a_part_that_is_not_there_is_refused_before_the_pictures_are_read(
    models: dict[str, Path], tmp_path: Path, capsys
) -> None:
    base = finetuning.copy(models["sd1"], tmp_path / "base")
    config = base / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mid_block_type": None}))
    (tmp_path / "empty").mkdir()
    assert finetuning.run(tmp_path / "empty", base, tmp_path / "out", "--max_steps", "1", "--train", "mid") == ExitCode.USAGE
    assert "--train mid: this U-Net has no such part" in last_error(capsys)


def test_a_folder_with_a_model_or_another_training_is_not_written_over(
    data: Path, models: dict[str, Path], tmp_path: Path, capsys
) -> None:
    output = tmp_path / "out"
    assert finetuning.run(data, models["sd1"], output, "--max_steps", "1", "--train", "mid", "--no-samples") == 0
    assert "draw    python main.py" in capsys.readouterr().err
    assert finetuning.run(data, models["sd1"], output, "--max_steps", "1") == ExitCode.USAGE
    assert "--resume goes on with it" in last_error(capsys)
    assert finetuning.resume(data, output, "--train", "all", "--force") == ExitCode.USAGE
    assert "cannot go on from checkpoint-1 with train.part mid -> all" in last_error(capsys)
    assert training.resume(data, output) == ExitCode.REFUSED
    assert "its settings are those of another version" in last_error(capsys)


def test_sample_pictures_are_drawn_by_the_average(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Its pictures, and its alone: with a decay of nothing they are those of the last step."""
    pictures = {}
    for decay in ("0", "none", "0.999"):
        settings = ("--max_steps", "2", "--lr", "1e-2", "--train", "mid", "--ema_decay", decay, "--sample_prompts", "sks")
        assert finetuning.run(data, models["sd1"], tmp_path / decay, *settings) == 0
        with Image.open(tmp_path / decay / "samples" / "step-000002-0.png") as picture:
            pictures[decay] = picture.tobytes()
    assert pictures["0"] == pictures["none"]
    assert pictures["0.999"] != pictures["none"]


def test_help_and_defaults(capsys) -> None:
    assert finetune.main(["--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--train PART", "--captions-file", "--ema-decay", "--crop", "--estimate-vram", "exit codes"):
        assert flag in text
    for flag in ("--rank", "--class-prompt", "--quantize", "--masked-loss"):
        assert flag not in text
    assert FinetuneConfig().ema_decay == 0.999
