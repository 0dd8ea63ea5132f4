"""What the phases of a model from nothing share: the loop that learns, the losses' mathematics, the tokenizer."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from src import diffusion
from src.checkpoints import CheckpointFolder
from src.config import set_value
from src.diffusion import NoiseSchedule
from src.errors import ExitCode, UserError
from src.scenes import grammar
from src.scenes.facts import QUESTIONS
from src.scratch import clip, learning, tokenizer, unet, vae
from src.scratch.learning import Lesson, learn, learning_rate
from src.scratch.pictures import Pictures
from src.scratch.settings import MachineSettings, ScratchSettings, TokenizerSettings, UnetSettings, VaeSettings
from src.terminal import Terminal

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
    whole_log, cut_log = ([record | {"seconds": 0} for record in log] for log in logs)
    assert cut_log == whole_log  # also the point that the interruption fell into
    assert [record["step"] for record in logs[1] if record["kind"] == "train"] == [10, 20, 30]


def test_a_loss_that_is_no_number_ends_it_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no number 3 times in a row.*--restart --set \w+.learning_rate=0.05") as caught:
        learn(lesson(settings(), spoil_at=5), tmp_path, MachineSettings("cpu", "fp32"), Terminal())
    assert caught.value.exit_code == ExitCode.DIVERGED
    assert math.isnan(vae.psnr(torch.tensor([math.nan]), torch.zeros(1)))  # and a picture that is none has no quality


def test_a_figure_that_is_no_number_costs_no_checkpoint(tmp_path: Path) -> None:
    """A manifest holds no NaN: what was judged is then unknown, and what was learnt is kept."""
    taught = lesson(settings())
    taught.judge = lambda: ({"held_out_loss": math.nan}, None)
    assert math.isnan(learn(taught, tmp_path, MachineSettings("cpu", "fp32"), Terminal())["held_out_loss"])
    assert CheckpointFolder(tmp_path, print).newest().facts["figures"] == {"held_out_loss": None}


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    plan = settings(steps=103, warmup_steps=3)
    rates = [learning_rate(plan, step) for step in range(103)]
    assert rates[:4] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])
    assert rates[53] == pytest.approx(0.05)
    assert rates[-1] < 1e-4


def test_steps_are_compiled_where_that_pays(monkeypatch) -> None:
    cpu, whole = torch.device("cpu"), ScratchSettings()
    monkeypatch.setattr(unet.native, "cpp_compiler", lambda: "g++")
    for is_fast in (True, False):  # without fast bf16 it gains too little
        monkeypatch.setattr(unet, "has_fast_bf16", lambda device, is_fast=is_fast: is_fast)
        assert unet.is_compiled(whole, cpu) == is_fast
        assert not unet.is_compiled(ScratchSettings(unet=UnetSettings(steps=500)), cpu)
    assert unet.is_compiled(ScratchSettings(machine=MachineSettings(compile="on")), cpu)
    monkeypatch.setattr(unet.native, "cpp_compiler", lambda: None)
    monkeypatch.setattr(unet, "has_fast_bf16", lambda device: True)
    assert not unet.is_compiled(whole, cpu)


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
    """x_t = sqrt(1 - b_t) x_{t-1} + sqrt(b_t) e, t times over, has the mean and the variance of add_noise's one jump."""
    schedule = NoiseSchedule.from_config(unet.SCHEDULER)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # scaled linear
    random = torch.Generator().manual_seed(0)
    start = torch.full((100_000, 1, 1, 1), 2.0, dtype=torch.float64)
    x = start
    for t, beta in enumerate(betas[:701]):
        x = (1 - beta) ** 0.5 * x + beta**0.5 * torch.randn(x.shape, generator=random, dtype=torch.float64)
        if t in (0, 50, 300, 700):
            noise = torch.randn(start.shape, generator=random, dtype=torch.float64)
            jump = diffusion.add_noise(schedule, start, noise, torch.full((len(start),), t))
            assert float(x.mean()) == pytest.approx(float(jump.mean()), abs=0.02)
            assert float(x.std()) == pytest.approx(float(jump.std()), rel=0.02)


def test_a_network_that_knows_all_has_no_loss_and_dropped_captions_are_the_empty_one() -> None:
    schedule, settings = NoiseSchedule.from_config(unet.SCHEDULER), UnetSettings()
    latents = torch.randn(6, 4, 8, 8)
    embeddings, caption_of = torch.arange(4.0)[:, None, None].expand(4, 5, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    material = unet.Material(latents, embeddings, caption_of, torch.zeros(6, 8, 8), torch.ones(6))
    seen: list[list[float]] = []

    class Knowing(nn.Module):
        def forward(self, noisy, timesteps, captions, return_dict):
            seen.append(captions[:, 0, 0].tolist())
            a = torch.tensor(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)).float()[timesteps]
            a = a[:, None, None, None]
            noise = (noisy - a.sqrt() * latents[which]) / (1 - a).sqrt()
            return (a.sqrt() * noise - (1 - a).sqrt() * latents[which],)

    which = torch.tensor([0, 1, 2, 3, 4, 5])
    chances = torch.tensor([0.9, 0.05, 0.9, 0.9, 0.05, 0.9])  # of being dropped: 0.1 in noise, 0.5 in a clear picture
    arguments = (which, chances, torch.Generator().manual_seed(1), schedule, settings, torch.device("cpu"))
    assert float(unet.loss_of(Knowing(), material, *arguments)) < 1e-6
    assert seen == [[0, 3, 2, 0, 3, 2]]


def test_the_clearer_the_picture_the_more_captions_are_empty() -> None:
    schedule = NoiseSchedule(torch.tensor([0.9, 0.5, 0.01]), "v_prediction")
    chances = unet.dropout_of(schedule, UnetSettings(caption_dropout=0.1, caption_dropout_clear=0.5))
    assert chances.tolist() == pytest.approx([0.46, 0.3, 0.104])


def test_the_weights_are_min_snr_with_a_floor() -> None:
    half = NoiseSchedule(torch.tensor([0.9, 0.5, 0.01]), "v_prediction")  # SNR 9, 1 and 1 / 99
    weights = unet.weights_of(half, UnetSettings(snr_gamma=5, snr_floor=0.25))
    assert weights.tolist() == pytest.approx([5.25 / 10, 1.25 / 2, (1 / 99 + 0.25) / (100 / 99)])


def test_timesteps_come_as_often_as_they_weigh_and_evenly_within_a_batch() -> None:
    weights, random = torch.tensor([1.0, 0.0, 3.0, 4.0]), torch.Generator().manual_seed(0)
    batches = [unet.timesteps_by(weights, 16, random).bincount(minlength=4).tolist() for _ in range(50)]
    assert batches == [[2, 0, 6, 8]] * 50, "shares of the weight that hold a whole number of examples"
    drawn = torch.cat([unet.timesteps_by(weights, 3, random) for _ in range(20_000)]).bincount(minlength=4) / 60_000
    assert drawn.tolist() == pytest.approx([1 / 8, 0, 3 / 8, 1 / 2], abs=0.01)


def test_more_transformer_layers_begin_as_the_network_that_was() -> None:
    shallow, deep = (unet.build(UnetSettings(channels=(32, 64), transformer_layers=layers), 64, (4, 8)) for layers in (1, 3))
    deep.load_state_dict(unet.deepened(shallow.state_dict(), 1, 3))
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([900, 100]), torch.randn(2, 7, 64)
    with torch.no_grad():
        before = shallow(x, t, c).sample
        assert torch.equal(deep(x, t, c).sample, before)
    added = [name for name, _ in deep.named_parameters() if ".transformer_blocks.2." in name]
    assert len(added) == len([name for name, _ in shallow.named_parameters() if ".transformer_blocks.0." in name])
    deep(x, t, c).sample.square().mean().backward()  # and they can learn
    moved = [dict(deep.named_parameters())[name].grad.abs().max() > 0 for name in added if "to_out.0.weight" in name]
    assert all(moved)


def test_shapes_are_told_cell_by_cell_from_the_middle_block() -> None:
    torch.manual_seed(0)
    network = unet.build(UnetSettings(channels=(32, 64)), 64, (4, 16))
    pupil = unet.Pupil(network)
    network(torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 7, 64))
    shapes = torch.zeros(2, 16, 16, dtype=torch.uint8)
    shapes[1, 4:6, 8:12] = 3
    with torch.no_grad():
        pupil.telling.weight.zero_()
        pupil.telling.bias.zero_()
        pupil.telling.bias.view(11, 2, 2)[3] = 2  # told everywhere: number 3, seven times as likely as each other
    all_ways = 10 + np.exp(2)  # eight shapes, house, tree, nothing
    expected = (8 * (np.log(all_ways) - 2) + 0.2 * 504 * np.log(all_ways)) / 512
    assert pupil.shapes_loss(shapes).item() == pytest.approx(expected, rel=1e-5)
    network(torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 7, 64))
    with torch.no_grad():
        seen = pupil._seen.clone()
        pupil.telling.bias.zero_()
        pupil.telling.weight.view(11, 2, 2, 64)[3, 1, 0, 5] = 1  # told of each lower left cell, by one number of the state
    logits = torch.zeros(2, 11, 16, 16)
    logits[:, 3, 1::2, 0::2] = seen[:, 5]
    counted = torch.where(shapes > 0, 1.0, 0.2)
    expected = (counted * nn.functional.cross_entropy(logits, shapes.long(), reduction="none")).mean()
    assert pupil.shapes_loss(shapes).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("scale", [2.0, 4.5])
def test_the_contrastive_loss_is_exact_under_autocast(scale: float) -> None:
    """As in fp64: a logit of 90 has steps of a half in bf16."""
    torch.manual_seed(0)
    texts = torch.randn(64, 16)
    images = texts + torch.randn(64, 16)  # so far away that some find another's
    logits = torch.nn.functional.cosine_similarity(texts[:, None].double(), images[None].double(), dim=-1) * np.exp(scale)
    own = torch.arange(64)
    expected = (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2
    with torch.autocast("cpu", torch.bfloat16):
        found = clip.contrastive_loss(texts, images, torch.tensor(scale))
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_psnr_of_a_known_error() -> None:
    one = torch.zeros(1, 3, 4, 4)
    assert vae.psnr(one, one + 0.2) == pytest.approx(10 * np.log10(4 / 0.04))
    assert vae.psnr(one, one) > 100


def test_top1_counts_who_finds_its_own() -> None:
    images = torch.eye(4)
    assert clip.top1(images, images, list("abcd")) == (1.0, 1.0)
    assert clip.top1(images[[1, 0, 2, 3]], images, list("abca")) == (0.5, 0.75)


def test_the_nearest_pictures_are_shown_beside_each_captions_own() -> None:
    scenes = list(islice(grammar.scenes(0, "train"), 5))
    pixels = torch.stack([torch.full((3, 128, 128), 40 * shade, dtype=torch.uint8) for shade in range(5)])
    texts, images = torch.eye(5), torch.eye(5)[[1, 0, 2, 3, 4]]  # the first two take each other's picture
    sheet = clip.nearest(texts, images, Pictures(scenes, pixels))
    rows = [[sheet.getpixel((150 + 260 * column, 100 + 278 * row))[0] for column in range(5)] for row in range(5)]
    assert [row[0] for row in rows] == [0, 40, 80, 120, 160]  # its own
    assert [row[1] for row in rows] == [40, 0, 80, 120, 160]  # the nearest
    assert all(len(set(row[1:])) == 4 for row in rows)


def test_the_thumbnail_is_the_mean_of_each_square() -> None:
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    squares = pixels.reshape(2, 3, 2, 8, 2, 8).mean(dim=(3, 5))
    means = torch.cat([vae.THUMBNAIL_SCALE * squares, torch.randn(2, 5, 2, 2)], dim=1)
    assert float(vae.thumbnail_loss(means, pixels)) < 1e-10
    assert float(vae.thumbnail_loss(means + 0.3 * vae.THUMBNAIL_SCALE, pixels)) == pytest.approx(0.09, rel=1e-4)


def test_the_naming_loss_is_the_mean_over_questions_of_what_the_right_answers_lack() -> None:
    sizes = [len(possible) for possible in QUESTIONS.values()]
    right = torch.tensor([[0] * len(sizes), [size - 1 for size in sizes]])
    assert float(clip.naming_loss(torch.zeros(2, sum(sizes)), right)) == pytest.approx(np.mean(np.log(sizes)))
    sure = torch.cat([100 * nn.functional.one_hot(own, size) for own, size in zip(right.unbind(1), sizes)], dim=1)
    assert float(clip.naming_loss(sure, right)) < 1e-6
    sure[0, 0] = 0  # of the first question nothing is known, and the first kind was right
    assert float(clip.naming_loss(sure, right)) == pytest.approx(np.log(sizes[0]) / 2 / len(sizes))


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


def test_captions_are_counted_in_tokens() -> None:
    merges = tokenizer.learn_merges(Counter({"low": 5, "lower": 2}), 2)
    assert tokenizer.tokens_of("low", merges) == ["low</w>"] or len(tokenizer.tokens_of("low", merges)) == 1
    assert len(tokenizer.tokens_of("lower", [])) == 5


@pytest.mark.parametrize("value", [64, 1.5, None, True])
def test_a_list_of_numbers_is_not_one(value: object) -> None:
    with pytest.raises(UserError, match=r"vae\.channels: expected a list of whole numbers, got"):
        set_value(ScratchSettings(), "vae.channels", value)
