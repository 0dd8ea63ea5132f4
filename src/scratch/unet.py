"""The fifth phase: a network that tells noise from picture, guided by the caption (Ho et al. 2020; Rombach et al. 2022).

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e          latents x_0 (B, 12, 16, 16), noise e of the same shape, t in 0 .. 999
    v_t = sqrt(a_t) e - sqrt(1 - a_t) x_0          what the network gives; e = sqrt(a_t) v_t + sqrt(1 - a_t) x_t follows from it
    loss = w_t |v_t - v'(x_t, t, caption)|^2       w_t: see `weights_of`; the caption is empty now and then: `dropout_of`

Predicting v (Salimans and Ho 2022, arXiv 2202.00512) and predicting e is the same under these weights but for what the network
must be exact in: where nearly all is noise, v is the picture, e a copy of the input with a small difference that matters. There
v halves the error in the same time (docs/bench/learning-*.md).

A second task is learnt beside it: from the state of the middle block a linear layer tells which shape, house or tree lies in
which cell of the picture. Pixels hardly differ between a star and a heart of the same colour and place; this loss does. The
layer is not kept. The VAE and the text tower are frozen: latents and embeddings are computed once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor, nn

from src import diffusion, folders, native
from src.checkpoints import CheckpointFolder, read_manifest
from src.cpu_kernels import CpuAttention, is_plain
from src.diffusion import NoiseSchedule
from src.errors import UserError, refused
from src.evaluation.checking import check
from src.evaluation.skills import Judged, Scores, choose
from src.images import contact_sheet, encode_png
from src.scenes.drawing import TOLD, shapes_map
from src.scenes.grammar import is_hard
from src.scratch import clip, phase_report, vae
from src.scratch.card import BEGAN_FROM, LAYERS, SAMPLES, SKILL, check_begin, files_of
from src.scratch.learning import BEGUN, Lesson, device_of, learn, precision_of
from src.scratch.muon import has_fast_bf16
from src.scratch.phases import LATENTS, Work, digest
from src.scratch.pictures import read_pictures
from src.scratch.settings import ScratchSettings, UnetSettings
from src.scratch.tokenizer import read_tokenizer
from src.terminal import Terminal
from src.training.history import History
from src.training.speed import keep_freed_memory

SCHEDULER = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "prediction_type": "v_prediction", "steps_offset": 1,
}  # fmt: skip
SAMPLING = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}
WEIGHTS = "diffusion_pytorch_model.safetensors"
COMPILE_PAYS_SAMPLES = 100_000  # in bf16; in fp32 a step is 4 % faster, and the two and a half minutes are seldom paid back
EMPTY_CELL = 0.2  # what telling that nothing lies there counts, beside a shape: most cells are empty
KEPT = 8192  # pictures whose latents are kept together, a minute's work or two
JUDGED, CHECKED, SHOWN, SHOWN_STEPS, GUIDANCE = 256, 64, 24, 20, 5.0


@dataclass
class Material:
    """What the U-Net learns from: latents of deviation 1, embeddings of each distinct caption, and whose is whose."""

    latents: Tensor  # (N, 12, 16, 16)
    embeddings: Tensor  # (captions + 1, length, width) bf16; the last is that of the empty caption
    caption_of: Tensor  # (N,)
    shapes: Tensor  # (N, 16, 16) uint8, what lies where: `src.scenes.drawing.shapes_map`
    chances: Tensor  # (N,) how often each is drawn, beside the others: `UnetSettings.hard_scenes`


class Pupil(nn.Module):
    """The U-Net, and the layer that tells shapes from what its middle block gave last."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet, self.finer = unet, 2 ** (len(unet.config.block_out_channels) - 1)  # cells to a state's side
        self.telling = nn.Conv2d(unet.config.block_out_channels[-1], (1 + len(TOLD)) * self.finer**2, 1)
        self._seen: Tensor | None = None
        unet.mid_block.register_forward_hook(self._see)

    def _see(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen = output

    def shapes_loss(self, shapes: Tensor) -> Tensor:
        """Cross-entropy of what lies in the cells (B, 16, 16) of the batch that the U-Net has just seen: a scalar."""
        seen, self._seen = cast(Tensor, self._seen), None  # (B, D, 8, 8)
        told = F.pixel_shuffle(self.telling(seen).float(), self.finer)  # (B, 1 + shapes, 16, 16)
        counts = torch.ones(told.shape[1], device=told.device)
        counts[0] = EMPTY_CELL
        return F.cross_entropy(told, shapes.long(), weight=counts, reduction="none").mean()


def build(settings: UnetSettings, text_width: int, latents: tuple[int, int]) -> UNet2DConditionModel:
    """Random weights for latents of (channels, side); the innermost levels attend to pixels and caption.

    The caption, pooled, is also added to the timestep, and both scale as well as shift what the blocks' norms give.
    """
    levels = len(settings.channels)
    attends = [level >= levels - settings.attention_levels for level in range(levels)]
    channels, side = latents
    return UNet2DConditionModel(
        sample_size=side, in_channels=channels, out_channels=channels, block_out_channels=settings.channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        layers_per_block=settings.layers, transformer_layers_per_block=settings.transformer_layers,
        cross_attention_dim=text_width, norm_num_groups=16,
        attention_head_dim=tuple(width // settings.head_width for width in settings.channels),  # the number of heads, in truth
        addition_embed_type="text", addition_embed_type_num_heads=text_width // math.gcd(text_width, settings.head_width),
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def begin(unet: UNet2DConditionModel, work: Work, settings: UnetSettings) -> tuple[int, dict[str, bytes]]:
    """Take over the weights of an assembled model, if one is named.

    Returns how many samples they were learnt from, and a file that says where they come from. Raises UserError as
    `check_begin`, and refused for weights that are damaged.
    """
    if settings.begin_from is None:
        return 0, {}
    model = Path(settings.begin_from).expanduser()
    card = check_begin(model, settings, work)
    try:
        weights = safetensors.torch.load(files_of(model, card, "unet")[WEIGHTS])
        unet.load_state_dict(deepened(weights, card["phases"]["unet"]["settings"].get(LAYERS, 1), settings.transformer_layers))
    except (RuntimeError, KeyError, safetensors.SafetensorError):
        raise refused(f"{model}: its U-Net is damaged; assemble the model again") from None
    before = {"command": card["command"], "unet": card["phases"]["unet"]}
    before |= {name: card[name] for name in ("note", "began_from") if name in card}
    return int(card["phases"]["unet"]["figures"]["samples"]), {BEGAN_FROM: json.dumps(before, indent=2).encode()}


def deepened(weights: dict[str, Tensor], before: int, after: int) -> dict[str, Tensor]:
    """The weights of a U-Net whose attending blocks had ``before`` transformer layers, for one with ``after``.

    Each layer more begins as a copy of the last that adds nothing yet, so the network gives what it gave, bit for bit
    (block expansion: Wu et al. 2024, arXiv 2401.02415, section 3.2).
    """
    added = {}
    for name, tensor in weights.items():
        stem, last, leaf = name.partition(f".transformer_blocks.{before - 1}.")
        adds = leaf.startswith(("attn1.to_out.", "attn2.to_out.", "ff.net.2."))  # what goes onto the state
        for layer in range(before, after) if last else ():
            added[f"{stem}.transformer_blocks.{layer}.{leaf}"] = torch.zeros_like(tensor) if adds else tensor.clone()
    return weights | added


def prepared(unet: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """On its device, with channels last and, on a CPU, attention whose backward pass is fast."""
    unet = unet.to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        for module in unet.modules():
            if isinstance(module, Attention) and is_plain(module):
                module.set_processor(CpuAttention())
    return unet


def is_compiled(settings: ScratchSettings, device: torch.device) -> bool:
    """Whether steps are compiled: where it is asked for, or on a CPU that multiplies bf16 and has a compiler, for enough."""
    if settings.machine.compile != "auto":
        return settings.machine.compile == "on"
    samples, is_fast = settings.unet.steps * settings.unet.batch_size, device.type == "cpu" and has_fast_bf16(device)
    is_fast = is_fast and settings.machine.precision != "fp32"
    return is_fast and samples >= COMPILE_PAYS_SAMPLES and native.cpp_compiler() is not None


def learn_unet(work: Work, settings: ScratchSettings, terminal: Terminal) -> dict[str, float]:
    """Learn to tell noise from picture, and publish a diffusers folder."""
    inputs, device = work.inputs("unet"), device_of(settings.machine)
    autoencoder = vae.read_vae(work).to(device, memory_format=torch.channels_last)
    training = gather(work, settings, "train", autoencoder, terminal)
    judging = gather(work, settings, "held-out", autoencoder, terminal)
    scenes = read_pictures(work.result("scenes"), "held-out", min(CHECKED, settings.unet.examined)).scenes
    torch.manual_seed(settings.unet.seed)
    unet = build(settings.unet, training.embeddings.shape[-1], (training.latents.shape[1], training.latents.shape[-1]))
    learnt_before, origin = begin(unet, work, settings.unet)
    unet = prepared(unet, device)
    pupil = Pupil(unet).to(device)
    step_model = torch.compile(unet) if is_compiled(settings, device) else unet
    schedule = NoiseSchedule.from_config(SCHEDULER).to(device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        random = torch.Generator().manual_seed(settings.unet.seed * 1_000_003 + step)
        which = torch.multinomial(training.chances, settings.unet.batch_size, replacement=True, generator=random)
        chances = torch.rand(settings.unet.batch_size, generator=random)
        noise = loss_of(step_model, training, which, chances, random, schedule, settings.unet, device)
        shapes = pupil.shapes_loss(training.shapes[which].to(device))
        return noise + settings.unet.shapes_weight * shapes, {"noise": float(noise.detach()), "shapes": float(shapes.detach())}

    def judge() -> tuple[dict[str, float], Image.Image]:
        random = torch.Generator().manual_seed(0)  # always the same noise at the same timesteps
        which, never = torch.arange(min(JUDGED, len(judging.latents))), torch.ones(JUDGED)
        losses = [
            loss_of(unet, judging, part, never[: len(part)], random, schedule, settings.unet, device) * len(part)
            for part in which.split(64)
        ]
        captions = judging.embeddings[judging.caption_of[: len(scenes)]]
        pictures = sample(unet, autoencoder, captions, judging.embeddings[-1:], settings, device)
        right = [check(vae.strip(picture[None]), scene).all for picture, scene in zip(pictures, scenes)]
        figures = {"held_out_loss": float(sum(losses)) / len(which), f"adherence_of_{len(scenes)}": sum(right) / len(right)}
        return figures, sheet(pictures[:SHOWN], [scene.caption for scene in scenes[:SHOWN]])

    begun = {BEGUN: digest(origin[BEGAN_FROM])} if origin else {}
    lesson = Lesson("unet", pupil, settings.unet, loss, judge, {"inputs": inputs, "told": len(TOLD), **begun})
    figures = learn(lesson, work.of("unet"), settings.machine, terminal)
    figures["parameters"] = sum(item.numel() for item in unet.parameters())
    figures["samples"] = learnt_before + settings.unet.steps * settings.unet.batch_size
    shares, samples = examine(unet, autoencoder, work, settings, device, terminal)
    figures |= shares
    phase_report.write("unet", work.of("unet"), settings.unet, History(work.of("unet") / "log.jsonl"), figures)
    scheduler = DPMSolverMultistepScheduler(**SCHEDULER, **SAMPLING).to_json_string().encode()
    contents = {**vae.model_files(unet), "scheduler/scheduler_config.json": scheduler, SAMPLES: samples, **origin}
    work.publish("unet", settings, contents, figures, inputs)
    return figures


def loss_of(
    unet: torch.nn.Module, material: Material, which: Tensor, chances: Tensor, random: torch.Generator,
    schedule: NoiseSchedule, settings: UnetSettings, device: torch.device,
) -> Tensor:  # fmt: skip
    """The mean loss of some examples, each at a timestep of its own: a scalar. ``chances`` (B,) say whose caption is empty."""
    latents = material.latents[which].to(device)  # x_0 (B, 12, 16, 16)
    noise = torch.randn(latents.shape, generator=random).to(device)  # e (B, 12, 16, 16)
    weights = weights_of(schedule, settings)  # w (1000,)
    timesteps = timesteps_by(weights, len(which), random).to(device)  # t (B,), as often as their weights say
    empty, is_dropped = len(material.embeddings) - 1, chances < dropout_of(schedule, settings)[timesteps].cpu()
    captions = material.embeddings[material.caption_of[which].masked_fill(is_dropped, empty)]  # (B, 32, D)
    noisy = diffusion.add_noise(schedule, latents, noise, timesteps)  # x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e
    target = diffusion.target(schedule, latents, noise, timesteps)  # v_t = sqrt(a_t) e - sqrt(1 - a_t) x_0
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    predicted = unet(noisy, timesteps, captions.to(device).float(), return_dict=False)[0]  # v' (B, 12, 16, 16)
    return weights.mean() * F.mse_loss(predicted.float(), target)  # the mean of w_t |v_t - v'|^2 over all t


def weights_of(schedule: NoiseSchedule, settings: UnetSettings) -> Tensor:
    """(min(SNR, gamma) + floor) / (SNR + 1) of each timestep, (1000,): min-SNR (Hang et al. 2023) with a floor.

    Without it next to nothing is learnt of what is decided where SNR is small: which colours, and where things stand.
    """
    floor = settings.snr_floor / (schedule.snr + 1)
    every = torch.arange(schedule.timesteps, device=schedule.snr.device)
    return diffusion.loss_weights(schedule, every, settings.snr_gamma) + floor


def dropout_of(schedule: NoiseSchedule, settings: UnetSettings) -> Tensor:
    """The chance of an empty caption at each timestep, (T,): between that of noise and that of a clear picture, as a_t says.

    Guidance multiplies the difference between what the network gives with the caption and without. In a nearly clear picture
    the caption tells next to nothing, so that this difference is mostly the error of the case that is practised less; there
    both are practised alike.
    """
    noise, clear = settings.caption_dropout, settings.caption_dropout_clear
    return noise + (clear - noise) * schedule.alphas_cumprod


def timesteps_by(weights: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Timesteps (count,) drawn as often as their weights (T,) say, one from each of as many equal shares of the weight.

    The loss is the same in the mean as with equal chances and w_t before each square, but every example counts as much, and no
    batch lacks a part of the schedule (Kingma et al. 2021, arXiv 2107.00630, appendix I).
    """
    shares = weights.cpu().double().cumsum(0)
    places = (torch.rand(1, generator=random, dtype=torch.float64) + torch.arange(count)) / count  # (count,) in [0, 1)
    return torch.searchsorted(shares, places * shares[-1], right=True).clamp(max=len(weights) - 1)


def gather(work: Work, settings: ScratchSettings, split: str, autoencoder: torch.nn.Module, terminal: Terminal) -> Material:
    """Latents and embeddings of a split. ``autoencoder`` is the published VAE."""
    pictures = read_pictures(work.result("scenes"), split)
    latents = _encoded(work, split, pictures.pixels, autoencoder, settings, terminal)
    distinct = sorted(set(pictures.captions))
    text = clip.read_text_tower(work).to(device_of(settings.machine))
    terminal.start_progress(len(distinct) + 1)
    embeddings = clip.embed(
        text, read_tokenizer(work), [*distinct, ""], settings, lambda done: terminal.progress(done, "unet    reading captions")
    )
    terminal.end_progress()
    terminal.start_progress(len(pictures.scenes))
    shapes = torch.empty((len(pictures.scenes), latents.shape[-1], latents.shape[-1]), dtype=torch.uint8)
    for index, scene in enumerate(pictures.scenes):
        shapes[index] = torch.from_numpy(shapes_map(scene, latents.shape[-1]))
        terminal.progress(index + 1, "unet    telling shapes")
    terminal.end_progress()
    number = {caption: index for index, caption in enumerate(distinct)}
    caption_of = torch.tensor([number[caption] for caption in pictures.captions])
    chances = torch.tensor([settings.unet.hard_scenes if is_hard(scene) else 1.0 for scene in pictures.scenes])
    return Material(latents.float() * autoencoder.config.scaling_factor, embeddings, caption_of, shapes, chances)


def _encoded(
    work: Work, split: str, pixels: Tensor, autoencoder: torch.nn.Module, settings: ScratchSettings, terminal: Terminal
) -> Tensor:
    """Latents (N, 12, 16, 16) in fp16, kept on the disk part by part, so that a kill costs one part."""
    made_from = {name: work.inputs("unet")[name] for name in ("vae", "scenes")}
    store, parts = CheckpointFolder(work.of("unet"), terminal.say), []
    names = [f"{LATENTS}{split}-{start:06d}" for start in range(0, len(pixels), KEPT)]
    terminal.start_progress(len(pixels))
    for name, part in zip(names, pixels.split(KEPT)):
        facts = {**made_from, "count": len(part)}
        latents = _kept(store.root / name, facts)
        if latents is None:
            latents = _encode(
                autoencoder, part, settings, lambda done: terminal.progress(len(parts) * KEPT + done, "unet    encoding")
            )
            store.publish(name, {"latents.safetensors": safetensors.torch.save({"latents": latents})}, facts)
        parts.append(latents)
    terminal.end_progress()
    for other in store.root.iterdir():  # of more scenes than now
        if re.fullmatch(rf"{LATENTS}{split}-\d{{6}}", other.name) and other.name not in names:
            folders.remove_folder(other)
    return torch.cat(parts)


def _kept(folder: Path, facts: dict[str, Any]) -> Tensor | None:
    """Latents that were encoded before from the same; None where there are none, or damaged ones."""
    try:
        held = read_manifest(folder)
        return safetensors.torch.load(held.read("latents.safetensors"))["latents"] if held.facts == facts else None
    except UserError:
        return None


@torch.no_grad()
def _encode(autoencoder: torch.nn.Module, pixels: Tensor, settings: ScratchSettings, report: Callable[[int], None]) -> Tensor:
    """(N, 12, 16, 16) in fp16; ``report`` is told how many are done."""
    device, parts = autoencoder.device, []
    if device.type == "cpu":
        keep_freed_memory()  # a quarter of the time
    for part in pixels.split(64):
        with precision_of(settings.machine, device):
            parts.append(vae.encode(autoencoder, part.to(device).float() / 127.5 - 1).cpu().half())
        report(64 * len(parts))
    return torch.cat(parts)


def examine(
    unet: UNet2DConditionModel, autoencoder: torch.nn.Module, work: Work, settings: ScratchSettings, device: torch.device,
    terminal: Terminal,
) -> tuple[dict[str, float], bytes]:  # fmt: skip
    """The share of pictures that follow their prompts, skill by skill, as `evaluate adherence` has it; and some, as PNG."""
    grammar = work.result("scenes").facts["settings"].get("grammar", "full")  # that of what it has learnt
    scenes = choose(settings.unet.examined, 0, "both", grammar)
    text, tokenizer = clip.read_text_tower(work).to(device), read_tokenizer(work)
    empty = clip.embed(text, tokenizer, [""], settings)
    judged: list[Judged] = []
    shown: list[Tensor] = []
    terminal.start_progress(len(scenes))
    for start in range(0, len(scenes), CHECKED):
        part = scenes[start : start + CHECKED]
        captions = clip.embed(text, tokenizer, [scene.caption for scene in part], settings)
        pictures = sample(unet, autoencoder, captions, empty, settings, device, first_seed=start)
        verdicts = [check(vae.strip(picture[None]), scene) for picture, scene in zip(pictures, part)]
        judged += [Judged(scene, start + index, verdict) for index, (scene, verdict) in enumerate(zip(part, verdicts))]
        shown += pictures
        terminal.progress(len(judged), "unet    examined")
    terminal.end_progress()
    shares = Scores(tuple(judged)).skills
    every = range(0, len(scenes), math.ceil(len(scenes) / SHOWN))
    picture = sheet([shown[index] for index in every], [scenes[index].caption for index in every])
    figures = {f"{SKILL}{skill}": share.value for skill, share in shares.items() if share.value is not None}
    return figures, encode_png(picture, {})


def sheet(pictures: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """Pictures (3, 128, 128) in [-1, 1] in rows of six, twice as large, each with its caption."""
    large = [vae.strip(picture[None]).resize((256, 256), Image.Resampling.LANCZOS) for picture in pictures]
    return contact_sheet(large, captions, columns=6)


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel, autoencoder: torch.nn.Module, captions: Tensor, empty: Tensor, settings: ScratchSettings,
    device: torch.device, first_seed: int = 0,
) -> Tensor:  # fmt: skip
    """Pictures (B, 3, 128, 128) in [-1, 1] of embedded captions (B, 32, D), by the sampler that ships; each its own seed."""
    scheduler = DPMSolverMultistepScheduler(**SCHEDULER, **SAMPLING)
    scheduler.set_timesteps(SHOWN_STEPS, device=device)
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    seeds = range(first_seed, first_seed + len(captions))
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    latents = noise.to(device) * scheduler.init_noise_sigma  # (B, 12, 16, 16)
    both = torch.cat([empty.expand_as(captions), captions]).to(device).float()
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        with precision_of(settings.machine, device):
            without, told = unet(inputs, timestep, both, return_dict=False)[0].float().chunk(2)
        guided = without + GUIDANCE * (told - without)  # away from what any caption would get (Ho and Salimans 2022)
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    with precision_of(settings.machine, device):
        parts = (latents / autoencoder.config.scaling_factor).split(16)
        return torch.cat([autoencoder.decode(part).sample.float().clamp(-1, 1).cpu() for part in parts])
