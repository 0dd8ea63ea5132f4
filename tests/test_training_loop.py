"""One training step against a hand-written one; clipping, skipping, averaging; what judging must not change."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from src import dataset as datasets
from src.diffusion import NoiseSchedule
from src.errors import ExitCode
from src.train_config import TrainConfig
from src.training import loop
from src.training.batches import Feeder, Trainee
from src.training.latent_cache import LatentCache
from src.training.live_text import LiveText
from src.training.loop import batch_loss
from src.training.network import LoraNetwork
from src.training.text_cache import TextCache
from tests.tiny import pipelines, training

DDPM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.model(tmp_path_factory.mktemp("model") / "tiny-sd1")


def feeder_of(pipeline, data: Path, cache: Path, train: TrainConfig, subjects: int | None = None) -> Feeder:
    found = datasets.read_dataset(data, 64, step_px=16, buckets=False, validation_every=0)
    latents = LatentCache(pipeline.vae, cache, vae_id="tiny", device="cpu", say=print)
    texts = TextCache(pipeline, cache, encoder_id="tiny", device="cpu", say=print)
    latents.encode(found.train, train.flip, lambda done, total: None)
    texts.encode([caption for example in found.train for caption in example.captions])
    is_sdxl = hasattr(pipeline, "text_encoder_2")
    subject, priors = found.train[:subjects], found.train[subjects:] if subjects else ()
    return Feeder(replace(found, train=subject), priors, latents, texts, train, timestep_count=1000, is_sdxl=is_sdxl)


def by_hand(pipeline, weights: dict[str, Tensor], batch, kind: str, gamma: float | None) -> Tensor:
    """The loss as the papers write it, with diffusers' scheduler and pipelines, and merged weights."""
    scheduler = DDPMScheduler(**DDPM, prediction_type=kind)
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    target = batch.noise
    if kind == "v_prediction":
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    added = None
    captions = batch.captions
    with torch.no_grad():
        if hasattr(pipeline, "text_encoder_2"):
            tokens, _, pooled, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False, device="cpu")
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * len(captions))}
        else:
            tokens, _ = pipeline.encode_prompt(list(captions), "cpu", 1, False)
        for row in batch.preserved:
            one = {"added_cond_kwargs": added and {name: value[row : row + 1] for name, value in added.items()}}
            target = target.clone()
            target[row] = pipeline.unet(noisy[row : row + 1], batch.timesteps[row], tokens[row : row + 1], **one).sample[0]
    prediction = torch.func.functional_call(
        pipeline.unet, weights, (noisy, batch.timesteps, tokens), {"added_cond_kwargs": added}
    ).sample
    a = scheduler.alphas_cumprod[batch.timesteps]
    snr = a / (1 - a)
    weight = torch.ones(len(captions))
    if gamma is not None:
        weight = torch.minimum(snr, torch.tensor(gamma)) / (snr if kind == "epsilon" else snr + 1)
    return (F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3)) * weight).mean()


@pytest.mark.parametrize("preserved", [(), (1,)])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_loss_and_gradients_of_a_step_are_those_computed_by_hand(
    family: str, kind: str, gamma: float | None, preserved: tuple[int, ...], data: Path, tmp_path: Path
) -> None:
    train = TrainConfig(batch_size=2, snr_gamma=gamma, caption_dropout=0, alpha=8.0)
    pipeline, reference = (getattr(pipelines, family)() for _ in range(2))
    reference.unet.requires_grad_(False)
    feeder = feeder_of(pipeline, data, tmp_path, train)
    network = LoraNetwork({"unet": pipeline.unet}, train, computes_in=torch.float32)
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.trainable().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=source))
    leaves = {name: item.detach().clone().requires_grad_() for name, item in network.trainable().items()}
    weights = {}
    for _, module in network.layers():
        down, up = leaves[f"unet.{module}.down"], leaves[f"unet.{module}.up"]
        weights[f"{module}.weight"] = reference.unet.get_submodule(module).weight + (8.0 / 4) * up @ down

    batch = replace(feeder.batch(1), preserved=preserved)
    schedule = NoiseSchedule.from_config(DDPM | {"prediction_type": kind})
    mine = batch_loss(Trainee(pipeline.unet), batch, schedule, gamma, network.taken_off)
    theirs = by_hand(reference, weights, batch, kind, gamma)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    mine.backward()
    theirs.backward()
    for name, parameter in network.trainable().items():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, atol=1e-5, rtol=1e-3)
    assert any(parameter.grad.abs().max() > 1e-4 for parameter in network.trainable().values())


def test_pictures_of_the_class_and_empty_captions_are_preserved_beside_a_class(data: Path, tmp_path: Path) -> None:
    train = TrainConfig(batch_size=3, caption_dropout=0.4)
    for other, subjects in ((replace(train, prior_target="noise"), 2), (train, None)):
        feeder = feeder_of(pipelines.sd1(), data, tmp_path, other, subjects)
        assert not any(feeder.batch(index).preserved for index in range(20))
    feeder = feeder_of(pipelines.sd1(), data, tmp_path, train, subjects=2)
    kinds = set()
    for index in range(20):
        batch = feeder.batch(index)
        for row, draw in enumerate(feeder.order.batch(index)):
            is_prior, is_empty = draw.example >= 2, batch.captions[row] == ""
            assert (row in batch.preserved) == (is_prior or is_empty)
            kinds.add((is_prior, is_empty))
    assert len(kinds) == 4


def test_a_dropped_caption_gives_every_tensor_a_gradient_of_zero() -> None:
    """Without one, several processes would wait for it for ever; SDXL takes zeros for an empty caption."""
    pipeline = pipelines.sdxl()
    assert pipeline.config.force_zeros_for_empty_prompt
    encoders = {name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2")}
    network = LoraNetwork(encoders, TrainConfig(), computes_in=torch.float32)
    tokens, pooled = LiveText(pipeline)([""], 1)
    assert not tokens.any()
    assert not pooled.any()
    (tokens.sum() + pooled.sum()).backward()
    gradients = [parameter.grad for parameter in network.trainable().values()]
    assert not any(gradient is None or gradient.any() for gradient in gradients)


def test_two_processes_get_the_halves_of_one_batch(data: Path, tmp_path: Path) -> None:
    pipeline = pipelines.sd1()
    whole = feeder_of(pipeline, data, tmp_path, TrainConfig(batch_size=2, flip=True))
    half = feeder_of(pipeline, data, tmp_path, TrainConfig(batch_size=1, flip=True))
    half.order = whole.order  # of two processes
    for index in range(6):
        together, apart = whole.batch(index), [half.batch(index, process) for process in range(2)]
        for name in ("latents", "noise", "timesteps", "tokens"):
            assert torch.equal(getattr(together, name), torch.cat([getattr(item, name) for item in apart])), name


def test_masks_weigh_the_loss_where_they_are_white(tmp_path: Path) -> None:
    from PIL import Image

    folder = training.photos(tmp_path / "masked", count=1)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(folder / "0000-masklabel.png")
    pipeline, train = pipelines.sd1(), TrainConfig(masked_loss=True, unmasked_weight=0.25)
    found = datasets.read_dataset(folder, 64, step_px=16, buckets=False, validation_every=0, masked=True)
    latents = LatentCache(pipeline.vae, tmp_path, vae_id="tiny", device="cpu", say=print)
    texts = TextCache(pipeline, tmp_path, encoder_id="tiny", device="cpu", say=print)
    latents.encode(found.train, False, lambda done, total: None)
    texts.encode(found.train[0].captions)
    batch = Feeder(found, (), latents, texts, train, timestep_count=1000).batch(0)
    assert batch.mask.shape == (1, 1, 8, 8)
    assert batch.mask[0, 0, :, :4].unique().tolist() == [1.0]
    assert batch.mask[0, 0, :, 4:].unique().tolist() == [0.25]


def final_state(output: Path, step: int) -> dict[str, Tensor]:
    return training.state(output / f"checkpoint-{step}")


def test_gradients_are_clipped_and_steps_accumulated(data: Path, base: Path, tmp_path: Path, monkeypatch) -> None:
    """What the optimizer sees: the mean gradient of four micro-steps, shortened to the norm that was asked for."""
    seen = []
    apply = loop._apply

    def spy(job, loss, grad_norm):
        grads = [parameter.grad.detach().clone() for parameter in job.network.trainable().values()]
        parts = []
        for micro in range(4):
            job.optimizer.zero_grad()
            batch_loss(job.trainee, job.feeder.batch(micro), job.schedule, job.train.snr_gamma).backward()
            parts.append([parameter.grad.detach().clone() for parameter in job.network.trainable().values()])
        means = [torch.stack(column).mean(dim=0) for column in zip(*parts)]
        seen.append((grads, means, grad_norm))
        return apply(job, loss, grad_norm)

    monkeypatch.setattr(loop, "_apply", spy)
    arguments = ("--max_steps", "1", "--gradient_accumulation", "4", "--max_grad_norm", "1e-4")
    assert training.run(data, base, tmp_path / "out", *arguments) == 0
    [(grads, means, grad_norm)] = seen
    norm = math.sqrt(sum(float(mean.square().sum()) for mean in means))
    assert norm > 1e-3
    assert grad_norm == pytest.approx(norm, rel=1e-4)
    for grad, mean in zip(grads, means):
        torch.testing.assert_close(grad, mean * (1e-4 / norm), rtol=1e-3, atol=1e-9)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    original = Feeder.batch

    def batch(self, index, process=0):
        made = original(self, index, process)
        if index in steps:
            made.noise[0, 0, 0, 0] = float("nan")
        return made

    monkeypatch.setattr(Feeder, "batch", batch)


def test_a_loss_that_is_no_number_is_skipped_and_counted(data: Path, base: Path, tmp_path: Path, monkeypatch) -> None:
    poison(monkeypatch, {2, 3, 6})
    assert training.run(data, base, tmp_path / "out", "--max_steps", "8") == 0
    numbers = json.loads((tmp_path / "out" / "checkpoint-8" / "state" / "numbers.json").read_text())
    assert numbers["progress"]["skipped"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in final_state(tmp_path / "out", 8).values())
    optimizer_steps = {float(t) for name, t in final_state(tmp_path / "out", 8).items() if name.endswith(".step")}
    assert optimizer_steps == {5.0}


def test_three_in_a_row_stop_the_run_and_keep_the_last_checkpoint(
    data: Path, base: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    poison(monkeypatch, {5, 6, 7})
    code = training.run(data, base, tmp_path / "out", "--max_steps", "10", "--checkpoint_steps", "4")
    assert code == ExitCode.DIVERGED
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: step 8: the loss was no number 3 times in a row")
    assert [path.name for path in sorted((tmp_path / "out").glob("checkpoint-*"))] == ["checkpoint-4"]
    assert not (tmp_path / "out" / "final").exists()


def test_an_adapter_that_is_no_number_is_never_written(data: Path, base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    apply = loop._apply

    def break_it(job, loss, grad_norm):
        done = apply(job, loss, grad_norm)
        with torch.no_grad():
            next(iter(job.network.trainable().values()))[0, 0] = float("inf")
        return done

    monkeypatch.setattr(loop, "_apply", break_it)
    assert training.run(data, base, tmp_path / "out", "--max_steps", "1") == ExitCode.DIVERGED
    assert "the adapter holds NaN or infinity" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_judging_changes_nothing_that_is_learnt(data: Path, base: Path, tmp_path: Path) -> None:
    """Validation, samples and their random numbers leave the training as it was, bit for bit."""
    common = ("--max_steps", "6", "--dropout", "0.1", "--validation_every", "2")
    assert training.run(data, base, tmp_path / "judged", *common, "--validation_steps", "2", "--sample_prompts", "sks",
                        "--set", "train.sample_inference_steps=2") == 0  # fmt: skip
    assert training.run(data, base, tmp_path / "plain", *common) == 0
    assert training.equal(final_state(tmp_path / "judged", 6), final_state(tmp_path / "plain", 6))
    samples = sorted(path.name for path in (tmp_path / "judged" / "samples").iterdir())
    assert samples == [f"step-{step:06d}-0.png" for step in (0, 2, 4, 6)]


def test_the_average_is_what_is_saved(data: Path, base: Path, tmp_path: Path) -> None:
    assert training.run(data, base, tmp_path / "out", "--max_steps", "3", "--ema_decay", "0.5", "--lr", "1e-2") == 0
    state = final_state(tmp_path / "out", 3)
    from src.lora.reading import read_adapter

    layers = read_adapter(tmp_path / "out" / "final").layers
    live, average = (
        {name: tensor for name, tensor in state.items() if name.startswith(part)} for part in ("adapter/", "average/")
    )
    (component, module), layer = next(iter(layers.items()))
    assert torch.equal(layer.down, average[f"average/{component}.{module}.down"])
    assert not torch.equal(layer.down, live[f"adapter/{component}.{module}.down"])
