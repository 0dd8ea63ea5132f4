"""Validation loss: equal to a hand-written reference, the same at any batch size, and without a trace on the training."""

import numpy
import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model

from src.dataset import subkey
from src.diffusion import NoiseSchedule
from src.training.latent_cache import Latents
from src.training.text_cache import Text
from src.training.validation import Validation, spaced_timesteps, undisturbed
from tests.tiny import pipelines

CPU = torch.device("cpu")
SEED = 7
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def adapted(unet: torch.nn.Module) -> torch.nn.Module:
    """A U-Net with an adapter that does something, with dropout, in training mode."""
    torch.manual_seed(5)
    unet.requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["to_q", "to_v"], init_lora_weights=False)
    inject_adapter_in_model(config, unet)
    return unet.train()


def make_items(width: int, pooled: int | None, sizes=((8, 8), (8, 16), (16, 8))) -> list:
    source = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    items = []
    for number, (height, columns) in enumerate(sizes):
        latents = Latents(draw(4, height, columns), draw(4, height, columns).abs())
        text = Text(draw(77 * (1 + number % 2), width), draw(pooled) if pooled else None)
        ids = torch.tensor([64.0, 64, 0, 0, 8 * height, 8 * columns]) if pooled else None
        items.append((latents, text, ids))
    return items


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def family(request) -> tuple:
    if request.param == "sd1":
        return adapted(pipelines.sd1().unet), make_items(32, None)
    return adapted(pipelines.sdxl().unet), make_items(64, 40)


def reference(unet, items, seed: int, prediction_type: str) -> float:
    """By diffusers' scheduler, one picture and timestep at a time."""
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=prediction_type)
    squares = []
    for index, (latents, text, ids) in enumerate(items):
        for place, step in enumerate((125, 375, 625, 875)):
            key = subkey(subkey(seed, f"validation {index} {place}"), "noise")
            noise = torch.randn(latents.mean.shape, generator=torch.Generator().manual_seed(key))[None]
            x0, t = latents.mean[None], torch.tensor([step])
            added = None if text.pooled is None else {"text_embeds": text.pooled[None], "time_ids": ids[None]}
            with torch.no_grad():
                noisy = scheduler.add_noise(x0, noise, t)
                prediction = unet(noisy, t, text.tokens[None], added_cond_kwargs=added).sample
            target = noise if prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, t)
            squares.append(((prediction - target) ** 2).mean().item())
    return float(numpy.mean(squares))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_equal_to_a_hand_written_reference(family, prediction_type) -> None:
    unet, items = family
    schedule = NoiseSchedule.from_config(SCHEDULE | {"prediction_type": prediction_type})
    found = Validation(items, schedule, seed=SEED).loss(unet, CPU)
    unet.eval()
    expected = reference(unet, items, SEED, prediction_type)
    unet.train()
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_same_number_again_at_any_batch_size_and_another_for_other_weights(family) -> None:
    unet, items = family
    schedule = NoiseSchedule.from_config(SCHEDULE)
    losses = [Validation(items, schedule, seed=SEED, batch_size=size).loss(unet, CPU) for size in (1, 3, 4, 100)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    validation = Validation(items, schedule, seed=SEED)
    first = validation.loss(unet, CPU)
    torch.randn(17)  # nothing that happens in between counts
    assert validation.loss(unet, CPU) == first, "the same weights give another number"
    assert Validation(items, schedule, seed=SEED + 1).loss(unet, CPU) != first
    weight = next(parameter for parameter in unet.parameters() if parameter.requires_grad)
    with torch.no_grad():
        weight.neg_()  # adding one number to all would change nothing: what a layer norm gives sums to 0
        changed = validation.loss(unet, CPU)
        weight.neg_()
    assert changed != first


def test_the_training_does_not_notice(family) -> None:
    unet, items = family
    unet.train()
    odd = unet.mid_block.resnets[0]
    odd.eval()  # a mode that differs from its neighbours' comes back, too
    modes = [module.training for module in unet.modules()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    Validation(items, NoiseSchedule.from_config(SCHEDULE), seed=SEED).loss(unet, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in unet.modules()] == modes
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert torch.is_grad_enabled()
    odd.train()


def test_modes_and_random_numbers_come_back_after_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)).train()
    state = torch.get_rng_state()

    def fail() -> None:
        with undisturbed(model, device=CPU):
            assert not model[0].training
            assert not torch.is_grad_enabled()
            torch.randn(3)
            raise ArithmeticError("stop")

    with pytest.raises(ArithmeticError):
        fail()
    assert model[0].training
    assert torch.equal(torch.get_rng_state(), state)


def test_text_that_learns_is_asked_anew_each_time() -> None:
    unet, items = pipelines.sd1().unet, make_items(32, None, sizes=((8, 8),))
    texts = [items[0][1], Text(torch.zeros(77, 32))]
    asked = iter([texts[0], texts[1]])
    validation = Validation([(items[0][0], lambda: next(asked), None)], NoiseSchedule.from_config(SCHEDULE), seed=SEED)
    assert validation.loss(unet, CPU) != validation.loss(unet, CPU)
    fixed = Validation(items, NoiseSchedule.from_config(SCHEDULE), seed=SEED)
    asked = iter([texts[0]])
    assert validation.loss(unet, CPU) == fixed.loss(unet, CPU)


def test_encoders_that_learn_are_asked_without_their_dropout() -> None:
    unet, items = pipelines.sd1().unet, make_items(32, None, sizes=((8, 8),))
    encoder = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Dropout(0.5)).train()
    live = [(items[0][0], lambda: Text(encoder(items[0][1].tokens)), None)]
    validation = Validation(live, NoiseSchedule.from_config(SCHEDULE), seed=SEED)
    losses = {validation.loss(unet, CPU, encoders=[encoder]) for _ in range(3)}
    assert len(losses) == 1
    assert encoder[1].training


def test_autocast_is_used() -> None:
    unet, items = pipelines.sd1().unet, make_items(32, None, sizes=((8, 8),))
    validation = Validation(items, NoiseSchedule.from_config(SCHEDULE), seed=SEED)
    half = validation.loss(unet, CPU, lambda: torch.autocast("cpu", torch.bfloat16))
    assert half != validation.loss(unet, CPU)
    assert half == pytest.approx(validation.loss(unet, CPU), rel=0.05)


def test_timesteps_are_the_middles_of_equal_stretches() -> None:
    assert spaced_timesteps(1000, 4).tolist() == [125, 375, 625, 875]
    assert spaced_timesteps(1000, 1).tolist() == [500]
    assert spaced_timesteps(8, 8).tolist() == list(range(8))
    # The midpoint rule for the mean of a curve such as a loss over timesteps: within a few per cent with eight places.
    curve = torch.exp(-torch.arange(1000) / 300)
    assert curve[spaced_timesteps(1000, 8)].mean() == pytest.approx(curve.mean().item(), rel=0.02)


def test_without_pictures_there_is_no_number() -> None:
    loss = Validation([], NoiseSchedule.from_config(SCHEDULE), seed=SEED).loss(torch.nn.Identity(), CPU)
    assert numpy.isnan(loss)
