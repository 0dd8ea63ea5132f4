"""Sample pictures: equal to what diffusers draws with the same modules, and without a trace on the training."""

import gc
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import nn

from src import images
from src.base_models import LoadedModel
from src.errors import UserError
from src.schedulers import build_scheduler, find_sampler
from src.train_config import TrainConfig
from src.training.samples import Sampler, as_drawn, save_samples, saved_samples
from tests.tiny import pipelines

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a blue square on a hill, evening light")
SIZE_PX, STEPS, GUIDANCE, SEED = 64, 3, 5.0, 42


def test_prompts_are_those_that_the_generator_would_draw(tmp_path) -> None:
    (tmp_path / "hue.txt").write_text("teal")
    prompts = ("a {red|red} thing", "a __hue__ thing")
    drawn = as_drawn(settings(sample_prompts=prompts), tmp_path)
    assert drawn == ("a red thing", "a teal thing")
    with pytest.raises(UserError, match="<lora:ink> is not drawn with"):
        as_drawn(settings(sample_prompts=("a thing <lora:ink:0.5>",)), tmp_path)


def settings(**changes: object) -> TrainConfig:
    train = TrainConfig(resolution=SIZE_PX, sample_inference_steps=STEPS, sample_guidance_scale=GUIDANCE, sample_seed=SEED)
    for name, value in changes.items():
        setattr(train, name, value)
    return train


def loaded(pipeline, dtype: torch.dtype = torch.float32) -> LoadedModel:
    family = "SDXL" if hasattr(pipeline, "text_encoder_2") else "SD1"
    config = dict(pipeline.scheduler.config)
    return LoadedModel(pipeline, family, "tiny", Path(), Path(), None, CPU, dtype, config)


def adapt(unet: nn.Module, dropout: float = 0.5) -> nn.Module:
    """Put an adapter that does something into a U-Net, and set it to training."""
    torch.manual_seed(5)
    unet.requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["to_q", "to_v"], init_lora_weights=False)
    inject_adapter_in_model(config, unet)
    return unet.train()


@pytest.fixture(params=["sd1", "sdxl"])
def model(request) -> LoadedModel:
    return loaded(getattr(pipelines, request.param)())


def drawn_by_diffusers(model: LoadedModel, prompt: str, seed: int) -> numpy.ndarray:
    """The same modules in a pipeline of their own, called as diffusers' documentation calls it."""
    extra = {"add_watermarker": False} if model.family == "SDXL" else {"requires_safety_checker": False}
    kind = StableDiffusionXLPipeline if model.family == "SDXL" else StableDiffusionPipeline
    pipeline = kind(**model.pipeline.components, **extra)
    pipeline.scheduler = build_scheduler(find_sampler("dpm++_2m_karras"), model.scheduler_config)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, SIZE_PX // 8, SIZE_PX // 8, generator=torch.Generator().manual_seed(seed))
    options = {"height": SIZE_PX, "width": SIZE_PX, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    with torch.no_grad():
        return numpy.array(pipeline(prompt, latents=latents, **options).images[0])


def test_equal_to_diffusers_with_the_live_adapter(model) -> None:
    unet = model.pipeline.unet
    sampler = Sampler(model, PROMPTS, settings())
    base = sampler.draw(unet)
    adapt(unet)
    pictures = sampler.draw(unet)
    unet.eval()
    for index, prompt in enumerate(PROMPTS):
        expected = drawn_by_diffusers(model, prompt, SEED + index)
        assert abs(numpy.array(pictures[index]).astype(int) - expected.astype(int)).max() <= 1
        assert not numpy.array_equal(numpy.array(base[index]), numpy.array(pictures[index])), "the adapter has no effect"


def test_the_same_picture_again(model) -> None:
    unet = adapt(model.pipeline.unet)
    sampler = Sampler(model, PROMPTS, settings())
    first = sampler.draw(unet)
    torch.randn(3)
    for one, two in zip(first, sampler.draw(unet)):
        assert one.tobytes() == two.tobytes()


def test_the_training_does_not_notice(model) -> None:
    pipeline = model.pipeline
    unet = adapt(pipeline.unet)
    unet.enable_gradient_checkpointing()
    pipeline.vae.train()
    encoder_modes = [module.training for module in pipeline.text_encoder.modules()]
    before = (pipeline.unet, pipeline.scheduler, pipeline.vae.dtype, pipeline.vae.use_tiling)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    sampler = Sampler(model, PROMPTS, settings())
    sampler.draw(unet)
    assert torch.equal(torch.get_rng_state(), state)
    assert (pipeline.unet, pipeline.scheduler, pipeline.vae.dtype, pipeline.vae.use_tiling) == before
    assert all(module.training for module in unet.modules())
    assert unet.is_gradient_checkpointing
    assert pipeline.vae.training
    assert [module.training for module in pipeline.text_encoder.modules()] == encoder_modes
    assert all(torch.equal(weights[name], tensor) for name, tensor in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())


def trained(with_samples: bool) -> list[torch.Tensor]:
    """The adapter after four steps of plain training, with dropout out of the global random numbers."""
    model = loaded(pipelines.sd1())
    unet = adapt(model.pipeline.unet)
    unet.enable_gradient_checkpointing()
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    sampler = Sampler(model, PROMPTS[:1], settings(sample_inference_steps=2))
    torch.manual_seed(0)
    for step in range(4):
        noisy, noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
        loss = (unet(noisy, torch.tensor([10, 500]), text).sample - noise).square().mean()
        loss.backward()
        if with_samples and step % 2:
            sampler.draw(unet, lambda: torch.autocast("cpu", torch.bfloat16))  # in between gradients and their use
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in learning]


def test_a_training_with_samples_gives_the_same_weights_to_the_last_bit() -> None:
    assert all(torch.equal(one, two) for one, two in zip(trained(False), trained(True)))


def tensors_alive() -> tuple[int, int]:
    gc.collect()
    held = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return len(held), sum(item.nbytes for item in held)


def test_memory_returns(model) -> None:
    unet = adapt(model.pipeline.unet)
    sampler = Sampler(model, PROMPTS, settings())
    sampler.draw(unet)  # whatever a library keeps after its first call
    before = tensors_alive()
    pictures = sampler.draw(unet)
    assert tensors_alive() == before
    assert len(pictures) == 2


class Counting(nn.Module):
    """Stands in front of a text encoder and counts its calls."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.calls = encoder, 0
        self.config = encoder.config

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        return CPU

    def forward(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        assert not self.training
        return self.encoder(*args, **kwargs)


@pytest.mark.parametrize("learns", [False, True])
def test_prompts_are_encoded_once_unless_the_encoder_learns(learns) -> None:
    model = loaded(pipelines.sd1())
    counting = Counting(model.pipeline.text_encoder)
    model.pipeline.text_encoder = counting.train()
    sampler = Sampler(model, PROMPTS, settings(train_text_encoder=learns))
    at_construction = counting.calls
    assert (at_construction == 0) == learns
    sampler.draw(model.pipeline.unet)
    assert (counting.calls > at_construction) == learns
    assert counting.training


def test_an_encoder_that_has_learnt_changes_the_picture() -> None:
    model = loaded(pipelines.sd1())
    sampler = Sampler(model, PROMPTS[:1], settings(train_text_encoder=True))
    before = sampler.draw(model.pipeline.unet)[0]
    with torch.no_grad():
        for parameter in model.pipeline.text_encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert sampler.draw(model.pipeline.unet)[0].tobytes() != before.tobytes()


def fail_on_call(unet: nn.Module, calls: set[int], error: Exception | None) -> None:
    """Let some calls of a U-Net (counted from 0) raise, or give NaN."""
    count = iter(range(1000))

    def hook(module: nn.Module, inputs: object, output: tuple) -> tuple | None:
        if next(count) not in calls:
            return None
        if error is not None:
            raise error
        return (output[0] * float("nan"),)

    unet.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("error", "cause"), [(None, "was no number"), (torch.OutOfMemoryError("CUDA out of memory"), "memory ran out")]
)
def test_a_picture_that_cannot_be_drawn_is_left_out_and_said(error, cause) -> None:
    model = loaded(pipelines.sd1())
    lines: list[str] = []
    sampler = Sampler(model, PROMPTS, settings(), lines.append)
    fail_on_call(model.pipeline.unet, {0}, error)
    first, second = sampler.draw(model.pipeline.unet)
    assert first is None
    assert isinstance(second, Image.Image)
    assert len(lines) == 1
    assert cause in lines[0]
    assert PROMPTS[0] in lines[0]


def test_a_fault_of_the_program_is_no_missing_picture() -> None:
    model = loaded(pipelines.sd1())
    unet, scheduler = model.pipeline.unet, model.pipeline.scheduler
    fail_on_call(unet, {0}, RuntimeError("shapes do not match"))
    unet.train()
    with pytest.raises(RuntimeError, match="shapes"):
        Sampler(model, PROMPTS, settings()).draw(unet)
    assert model.pipeline.scheduler is scheduler
    assert unet.training


def test_samples_are_saved_and_found_again(tmp_path) -> None:
    pictures = [Image.new("RGB", (8, 8), "red"), None, Image.new("RGB", (8, 8), "blue")]
    prompts = ["a", "b", "ein Füchslein 🦊"]
    paths = save_samples(tmp_path, 250, pictures, prompts, seed=7)
    assert paths[1] is None
    assert paths[2] == tmp_path / "samples" / "step-000250-2.png"
    assert images.read_text_chunks(paths[2]) == {"prompt": prompts[2], "seed": "9", "step": "250"}
    save_samples(tmp_path, 250, pictures, prompts, seed=7)  # a resume draws them again
    save_samples(tmp_path, 1_500_000, pictures[:1], prompts, seed=7)
    (tmp_path / "samples" / "notes.png").write_bytes(b"")
    found = saved_samples(tmp_path)
    assert list(found) == [250, 1_500_000]
    assert found[250] == {0: paths[0], 2: paths[2]}
    assert saved_samples(tmp_path / "nowhere") == {}
