"""A model from nothing in miniature: every phase learns, what comes out loads anywhere, and a phase knows what it builds on."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from src.config import AppConfig
from src.diffusion import NoiseSchedule
from src.errors import ExitCode, UserError
from src.generator import TextToImageGenerator
from src.scenes.drawing import draw
from src.scratch import clip, latent_space, learning, tokenizer, unet, vae
from src.scratch.__main__ import main, read_settings
from src.scratch.learning import Lesson, learn, learning_rate
from src.scratch.phases import PHASES, Work
from src.scratch.pictures import read_pictures
from src.scratch.settings import MachineSettings, ScratchSettings, TokenizerSettings, VaeSettings
from src.terminal import Terminal

TINY = {
    "scenes.count": 40, "scenes.held_out": 32, "tokenizer.merges": 60,
    "vae.channels": "16,16", "vae.steps": 4, "vae.batch_size": 2, "vae.crop_px": 32, "vae.validation_steps": 2, "vae.checkpoint_steps": 2,
    "clip.width": 16, "clip.layers": 1, "clip.heads": 2, "clip.patch_px": 32, "clip.projection": 8, "clip.steps": 4, "clip.batch_size": 4,
    "clip.validation_steps": 2, "clip.checkpoint_steps": 2,
    "unet.channels": "16,32", "unet.head_width": 8, "unet.steps": 4, "unet.batch_size": 2, "unet.validation_steps": 4,
    "unet.checkpoint_steps": 2, "machine.device": "cpu", "machine.precision": "fp32",
}  # fmt: skip


def arguments(**more: object) -> list[str]:
    return [word for name, value in (TINY | more).items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything was done once."""
    folder = tmp_path_factory.mktemp("scratch")
    assert main(["all", "--work", str(folder / "work"), "--out", str(folder / "model"), *arguments()]) == 0
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    shutil.copytree(made / "work", tmp_path / "work")
    return tmp_path / "work"


# -- what comes out


def test_plain_diffusers_draws_with_what_was_assembled(made: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(made / "model")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle on a white background", num_inference_steps=2).images[0]
    assert image.size == (128, 128)
    assert np.asarray(image).std() > 0
    scheduler = pipeline.scheduler.config
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert (scheduler.use_karras_sigmas, scheduler.beta_schedule, scheduler.prediction_type) == (
        True,
        "scaled_linear",
        "epsilon",
    )


def test_the_generator_draws_with_it(made: Path) -> None:
    config = AppConfig()
    config.model.model_id, config.model.device = str(made / "model"), "cpu"
    (image,) = TextToImageGenerator(config).generate("a blue star", num_inference_steps=2, seed=1)
    assert image.size == (128, 128)


def test_its_clip_scores_pictures(made: Path) -> None:
    model = CLIPModel.from_pretrained(made / "model" / "clip")
    names = CLIPTokenizer.from_pretrained(made / "model" / "tokenizer")
    ids = clip.tokens_of(names, ["a red circle"])
    pixels = CLIPImageProcessor.from_pretrained(made / "model" / "clip")(
        Image.new("RGB", (128, 128), "white"), return_tensors="pt"
    )
    assert pixels["pixel_values"].shape == (1, 3, 128, 128)
    assert float(pixels["pixel_values"].min()) == 1.0  # white is 1, as the towers learnt it
    output = model(input_ids=ids, pixel_values=pixels["pixel_values"].to(model.dtype))
    assert output.logits_per_image.shape == (1, 1)
    text = clip.read_text_tower(Work(made / "work", print))
    expected = model.float().text_model(ids).last_hidden_state
    assert torch.allclose(text(ids).last_hidden_state, expected, atol=1e-3)


def test_the_card_tells_recipe_and_figures(made: Path) -> None:
    card = json.loads((made / "model" / "card.json").read_text())
    assert list(card["phases"]) == [phase for phase in PHASES if phase != "assemble"]
    assert card["phases"]["vae"]["settings"]["steps"] == 4
    assert card["phases"]["vae"]["figures"]["psnr_db"] > 0
    assert card["license"] == "MIT"
    assert sum(path.stat().st_size for path in (made / "model").rglob("*")) < 40 << 20


def test_each_phase_leaves_curves_pictures_and_a_report(made: Path) -> None:
    for phase in ("vae", "clip", "unet"):
        page = (made / "work" / phase / "report.html").read_text()
        assert "loss" in page
        assert "https:" not in page
        records = [json.loads(line) for line in (made / "work" / phase / "log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if record["kind"] == "validation"][-1] == 4
    sheet = Image.open(made / "work" / "vae" / "samples" / "step-000004.png")
    assert sheet.size == (8 * 128, 2 * 128)


def test_weights_are_of_the_moving_average(made: Path) -> None:
    import safetensors.torch

    checkpoint = Work(made / "work", print).of("vae") / "checkpoint-4" / "state" / "average.safetensors"
    average = safetensors.torch.load_file(checkpoint)
    published = vae.read_vae(Work(made / "work", print)).state_dict()
    assert all(torch.allclose(published[name], tensor, atol=1e-3) for name, tensor in average.items())
    work = Work(made / "work", print)
    with torch.no_grad():
        latents = vae.encode(vae.read_vae(work), read_pictures(work.result("scenes"), "train").floats(slice(40)))
    scale = vae.read_vae(Work(made / "work", print)).config.scaling_factor
    assert float(latents.std()) * scale == pytest.approx(1, rel=0.02)


# -- phases and what they build on


def test_the_same_command_again_does_nothing_again(copied: Path, capsys) -> None:
    assert main(["all", "--work", str(copied), "--out", str(copied / "model"), *arguments()]) == 0
    said = capsys.readouterr().err
    assert said.count(" is done ") == 5
    assert "step" not in said


def test_a_phase_without_those_before_it_is_refused_by_name(tmp_path: Path, capsys) -> None:
    assert main(["unet", "--work", str(tmp_path), *arguments()]) == ExitCode.NOT_FOUND
    assert "has no scenes yet; run python -m src.scratch scenes" in capsys.readouterr().err


def test_a_phase_from_another_version_of_an_earlier_one_is_refused(copied: Path, capsys) -> None:
    assert main(["vae", "--work", str(copied), "--restart", *arguments(**{"vae.seed": 9})]) == 0
    capsys.readouterr()
    assert main(["assemble", "--work", str(copied), *arguments()]) == ExitCode.USAGE
    assert "unet: was made from another vae than is there now" in capsys.readouterr().err


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(copied: Path, capsys) -> None:
    assert main(["vae", "--work", str(copied), *arguments(**{"vae.learning_rate": 0.5})]) == ExitCode.USAGE
    assert "learning_rate 0.001 -> 0.5" in capsys.readouterr().err


def test_what_is_not_ours_is_moved_aside(copied: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert main(["assemble", "--work", str(copied), "--out", str(out), *arguments()]) == 0
    assert (tmp_path / "mine-set-aside" / "thesis.txt").read_text() == "years of work"
    assert (out / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vea"], "'vea' is no phase"),
        (["vae", "--set", "steps=0"], "vae.steps 0 is outside"),
        (["vae", "--set", "stpes=3"], "did you mean 'vae.steps'?"),
        (["unet", "--set", "channels=100,200"], "each is a multiple of 16"),
        (["clip", "--set", "heads=5"], "no multiple of clip.heads"),
        (["vae", "--set", "crop_px=60"], "no multiple of 8"),
        (["all", "--set", "machine.precision=fp8"], "choose auto, fp32, bf16"),
    ],
)
def test_what_cannot_work_is_one_line(words: list[str], said: str, tmp_path: Path, capsys) -> None:
    assert main([*words, "--work", str(tmp_path)]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_settings_come_from_files_and_flags() -> None:
    quick = read_settings({"quick": True, "set": ["steps=7"]}, "unet")
    assert quick.unet.steps == 7
    assert quick.vae.steps < ScratchSettings().vae.steps
    assert read_settings({"set": ["unet.channels=32,64"]}, "all").unet.channels == (32, 64)
    for phase in ("vae", "clip", "unet"):  # the files show the recipe that ships, and may not drift from it
        assert read_settings({"config": [f"scratch/{phase}"]}, phase) == ScratchSettings()


# -- the loop


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.5]]))
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # whose memory has an order of its own


def lesson(settings: VaeSettings, spoil_at: int | None = None) -> Lesson:
    model = Line()

    def loss(step: int):
        x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step))
        value = ((x @ model.weight) - 0.5 * x).square().mean() + model.convolution(
            x.expand(8, 75).view(8, 3, 5, 5)
        ).square().mean()
        return (value * float("nan") if spoil_at is not None and step >= spoil_at else value), {}

    return Lesson(
        "vae", model, settings, loss, lambda: ({"distance": float(model.weight.detach().abs())}, None), {"inputs": {}}
    )


def settings(**more: object) -> VaeSettings:
    base = {
        "steps": 30,
        "batch_size": 8,
        "learning_rate": 0.1,
        "warmup_steps": 3,
        "validation_steps": 10,
        "checkpoint_steps": 10,
    }
    return VaeSettings(**(base | {"ema_decay": 0.5} | more))


def test_it_learns_and_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, monkeypatch) -> None:
    machine, terminal = MachineSettings("cpu", "fp32"), Terminal()
    whole = lesson(settings())
    learn(whole, tmp_path / "whole", machine, terminal)
    assert abs(float(whole.model.weight.detach()) - 0.5) < 0.3
    cut = lesson(settings())
    step = learning.Student.learn_a_step

    def stop_at_13(student: learning.Student) -> None:
        step(student)
        if student.step == 13:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(learning.Student, "learn_a_step", stop_at_13)
    with pytest.raises(UserError, match="interrupted after step 13") as caught:
        learn(cut, tmp_path / "cut", machine, terminal)
    assert caught.value.exit_code == 143
    monkeypatch.setattr(learning.Student, "learn_a_step", step)
    resumed = lesson(settings())
    learn(resumed, tmp_path / "cut", machine, terminal)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert torch.equal(resumed.model.convolution.weight, whole.model.convolution.weight)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "cut")
    ]
    judged = [[record | {"seconds": 0} for record in log if record["kind"] == "validation"] for log in logs]
    assert judged[0] == judged[1]
    assert [record["step"] for record in logs[1] if record["kind"] == "train"] == [10, 20, 30]


def test_a_loss_that_is_no_number_ends_it_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no number 3 times in a row.*learning_rate=0.05"):
        learn(lesson(settings(), spoil_at=5), tmp_path, MachineSettings("cpu", "fp32"), Terminal())


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    plan = settings(steps=103, warmup_steps=3)
    rates = [learning_rate(plan, step) for step in range(103)]
    assert rates[:4] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])
    assert rates[53] == pytest.approx(0.05)
    assert rates[-1] < 1e-4


# -- mathematics


def test_kl_is_that_of_two_gaussians() -> None:
    mean, log_variance = torch.randn(50), torch.randn(50)
    one = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(vae.kl_to_normal(mean, log_variance), expected, atol=1e-5)
    assert float(vae.kl_to_normal(torch.zeros(1), torch.zeros(1))) == 0


def test_the_contrastive_loss_of_known_logits() -> None:
    """Orthogonal pairs at scale s: log(1 + (B - 1) e^-s) both ways; nothing learnt: log B."""
    same = torch.eye(5)
    assert float(clip.contrastive_loss(same, 3 * same, torch.tensor(2.0))) == pytest.approx(
        np.log1p(4 * np.exp(-np.exp(2.0))), rel=1e-4
    )
    assert float(clip.contrastive_loss(torch.ones(5, 3), torch.ones(5, 3), torch.tensor(1.0))) == pytest.approx(np.log(5))
    texts, images = torch.randn(4, 6), torch.randn(4, 6)
    logits = torch.nn.functional.cosine_similarity(texts[:, None], images[None], dim=-1).double().numpy() * np.exp(0.7)
    rows = -np.log(np.diag(np.exp(logits)) / np.exp(logits).sum(1)).mean()
    columns = -np.log(np.diag(np.exp(logits)) / np.exp(logits).sum(0)).mean()
    assert float(clip.contrastive_loss(texts, images, torch.tensor(0.7))) == pytest.approx((rows + columns) / 2, rel=1e-5)


def test_one_jump_to_t_is_as_many_small_steps() -> None:
    """x_t = sqrt(1 - b_t) x_{t-1} + sqrt(b_t) e, t times over: the mean's factor and the variance are those of the closed form."""
    schedule = NoiseSchedule.from_config(unet.SCHEDULER)
    cumulative = schedule.alphas_cumprod.double()
    alphas = torch.cat([cumulative[:1], cumulative[1:] / cumulative[:-1]])
    factor, variance = 1.0, 0.0
    for t, alpha in enumerate(alphas.tolist()):
        factor, variance = factor * alpha**0.5, variance * alpha + (1 - alpha)
        if t in (0, 10, 500, 999):
            assert factor == pytest.approx(float(cumulative[t]) ** 0.5, rel=1e-6)
            assert variance == pytest.approx(1 - float(cumulative[t]), rel=1e-6)
    random = torch.Generator().manual_seed(0)
    x = torch.full((20_000,), 2.0, dtype=torch.float64)
    for alpha in alphas[:300].tolist():
        x = alpha**0.5 * x + (1 - alpha) ** 0.5 * torch.randn(x.shape, generator=random, dtype=torch.float64)
    assert float(x.mean()) == pytest.approx(2 * float(cumulative[299]) ** 0.5, abs=0.02)
    assert float(x.var()) == pytest.approx(1 - float(cumulative[299]), abs=0.02)


def test_psnr_of_a_known_error() -> None:
    one = torch.zeros(1, 3, 4, 4)
    assert vae.psnr(one, one + 0.2) == pytest.approx(10 * np.log10(4 / 0.04))
    assert vae.psnr(one, one) > 100


def test_top1_counts_who_finds_its_own() -> None:
    images = torch.eye(4)
    assert clip.top1(images, images, list("abcd")) == (1.0, 1.0)
    assert clip.top1(images[[1, 0, 2, 3]], images, list("abca")) == (0.5, 0.75)


def test_crops_are_pieces_of_their_pictures(made: Path) -> None:
    pictures = read_pictures(Work(made / "work", print).result("scenes"), "train")
    assert np.array_equal(pictures.pixels[3].permute(1, 2, 0).numpy(), np.asarray(draw(pictures.scenes[3])))
    batch = vae.crops(pictures, VaeSettings(batch_size=6, crop_px=32), 5)
    assert torch.equal(batch, vae.crops(pictures, VaeSettings(batch_size=6, crop_px=32), 5))
    whole = pictures.floats(slice(None))
    found = 0
    for number, crop in enumerate(batch):
        crop = crop.flip(-1) if number % 2 else crop
        windows = whole.unfold(2, 32, 1).unfold(3, 32, 1)  # (N, 3, 97, 97, 32, 32)
        corner = (windows[..., 0, 0] == crop[:, 0, 0][None, :, None, None]).all(1) & (
            windows[..., -1, -1] == crop[:, -1, -1][None, :, None, None]
        ).all(1)
        found += any(torch.equal(whole[n, :, y : y + 32, x : x + 32], crop) for n, y, x in corner.nonzero().tolist())
    assert found == 6


# -- tokenizer


def test_merges_are_those_of_the_papers_example() -> None:
    """Sennrich et al. 2016, section 3.2: low 5, lower 2, newest 6, widest 3."""
    words = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})
    merges = tokenizer.learn_merges(words, 5)
    assert merges[:3] == [("e", "s"), ("es", "t</w>"), ("l", "o")]
    assert tokenizer.learn_merges(Counter({"a": 3}), 9) == []


def test_known_words_are_one_token_and_any_text_comes_back(tmp_path: Path) -> None:
    merges = tokenizer.learn_merges(Counter({"circle": 9, "red": 9, "background": 4}), 100)
    for name, data in tokenizer.tokenizer_files(merges, TokenizerSettings(length=16)).items():
        (tmp_path / name).write_bytes(data)
    learnt = CLIPTokenizer.from_pretrained(tmp_path)
    assert learnt.tokenize("Red circle background") == ["red</w>", "circle</w>", "background</w>"]
    assert (
        learnt.decode(learnt("ein grüner Würfel, 100 €").input_ids, skip_special_tokens=True).replace(" ", "")
        == "eingrünerwürfel,100€"
    )
    row = clip.tokens_of(learnt, ["red circle"])[0].tolist()
    assert len(row) == 16
    assert row[0] == learnt.bos_token_id
    assert set(row[3:]) == {learnt.eos_token_id}


# -- the latent space's tools


def test_slerp_keeps_lengths_and_halves_angles() -> None:
    one, other = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    assert torch.allclose(latent_space.slerp(one, other, 0.5), torch.tensor([2.0, 2.0]) / 2**0.5)
    assert torch.allclose(latent_space.slerp(one, other, 0.25).norm(), torch.tensor(2.0))
    assert torch.allclose(latent_space.slerp(one, 2 * one, 0.5), 1.5 * one)


def test_tools_write_one_picture_each(made: Path, tmp_path: Path, capsys) -> None:
    draw(next(iter(read_pictures(Work(made / "work", print).result("scenes"), "train").scenes))).save(tmp_path / "a.png")
    Image.new("RGB", (300, 200), "blue").save(tmp_path / "b.png")
    a, b, model = (
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
        ["--model", str(made / "model"), "--out", str(tmp_path), "--count", "3"],
    )
    runs = {
        "interpolate": [["--picture", a, "--picture", b], ["--prompt", "a red star", "--prompt", "a blue star"]],
        "reconstruct": [["--picture", a, "--picture", b]], "around": [["--picture", a]],
    }  # fmt: skip
    for tool, choices in runs.items():
        for choice in choices:
            assert main([tool, *choice, *model]) == 0
            path = Path(capsys.readouterr().out.strip())
            assert min(Image.open(path).size) >= 128
    assert main(["interpolate", "--picture", a, *model]) == ExitCode.USAGE
    assert "takes two --prompt or two --picture" in capsys.readouterr().err
    assert main(["around", "--picture", a, "--model", str(tmp_path)]) == ExitCode.NOT_FOUND
    assert main(["around", "--picture", str(tmp_path / "none.png"), *model]) == ExitCode.NOT_FOUND
