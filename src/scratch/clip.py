"""The fourth phase: captions and pictures in one space (Radford et al. 2021, arXiv 2103.00020).

    captions (B, 32) --text tower---> (B, 128) --\\
                                                  e^t * cosines (B, B): each caption finds its picture, and the other way round
    pixels (B, 3, 128, 128) --image tower--> (B, 128) --/

The text tower, without its projection, then tells the U-Net what to draw; both together judge pictures.

Telling pictures apart asks little of the tower's last states, and the U-Net could read words from them only slowly. So the
tower also learns to name what its caption says: from its state at the end token, or at any token after it, a linear layer
answers each question of `src.scenes.facts`. That layer is not kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from src.images import contact_sheet
from src.scenes.facts import QUESTIONS, answers
from src.scenes.grammar import SIZE_PX
from src.scratch.learning import Lesson, device_of, learn, precision_of
from src.scratch.phases import Work
from src.scratch.pictures import Pictures, read_pictures
from src.scratch.settings import ClipSettings, ScratchSettings
from src.scratch.tokenizer import read_tokenizer
from src.terminal import Terminal

SHOWN, NEAREST = 6, 4  # captions in the report, and pictures that are found for each
JUDGED = 128  # pictures among which each caption looks for its own
MAX_SCALE = math.log(100)  # of the temperature, as in the paper


def build(settings: ClipSettings, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Random weights; both towers are equally large."""
    tower = {
        "hidden_size": settings.width, "intermediate_size": settings.width * 4, "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads, "projection_dim": settings.projection,
    }  # fmt: skip
    text = tower | {
        "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = tower | {"image_size": SIZE_PX, "patch_size": settings.patch_px}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.projection))


def contrastive_loss(texts: Tensor, images: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of the scaled cosines of (B, D) and (B, D), whose i-th rows belong together (CLIP, figure 3).

    l_ij = exp(s) cos(t_i, p_j)        loss = -1/2B sum_i (log softmax_j(l_ij)[i] + log softmax_j(l_ji)[i])
    """
    with torch.autocast(texts.device.type, enabled=False):  # a logit of 50 has steps of a quarter in bf16
        texts, images = F.normalize(texts.float(), dim=-1), F.normalize(images.float(), dim=-1)
        logits = log_scale.clamp(max=MAX_SCALE).exp() * texts @ images.t()  # (B, B)
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


class Pupil(nn.Module):
    """Both towers, and the layer that names what a caption says."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.naming = nn.Linear(clip.config.text_config.hidden_size, sum(map(len, QUESTIONS.values())))


def by_question(logits: Tensor) -> tuple[Tensor, ...]:
    """(B, all possible answers) -> for each question (B, its answers), in fp32."""
    return logits.float().split([len(possible) for possible in QUESTIONS.values()], dim=1)


def naming_loss(logits: Tensor, answered: Tensor) -> Tensor:
    """The mean cross-entropy of all questions: logits (B, all possible answers), the right ones (B, questions)."""
    return torch.stack([F.cross_entropy(own, right) for own, right in zip(by_question(logits), answered.unbind(1))]).mean()


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(B, length) token numbers, filled up with the end token."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def cosines_of(texts: Tensor, images: Tensor) -> Tensor:
    """Of (B, D) and (N, D): (B, N) in fp32, for bf16 knows no difference between 0.91 and 0.912."""
    with torch.autocast(texts.device.type, enabled=False):
        return F.normalize(texts.float(), dim=-1) @ F.normalize(images.float(), dim=-1).t()


def top1(texts: Tensor, images: Tensor, captions: list[str]) -> tuple[float, float]:
    """How many captions find their own picture first, and how many could: of identical ones only one can."""
    nearest = cosines_of(texts, images).argmax(dim=1)
    found = float((nearest == torch.arange(len(texts), device=texts.device)).float().mean())
    return found, len(set(captions)) / len(captions)


def nearest(texts: Tensor, images: Tensor, pictures: Pictures) -> Image.Image:
    """A row for each of the first captions: its own picture, then those of the highest cosines, with their own captions."""
    cosines = cosines_of(texts, images)
    drawn, cells = pictures.images(), []
    labels: list[str] = []
    for row, caption in enumerate(pictures.captions[:SHOWN]):
        best = cosines[row].topk(min(NEAREST, len(pictures))).indices.tolist()
        cells += [drawn[index] for index in (row, *best)]
        labels += [caption, *(f"{cosines[row, index]:.2f}  {pictures.captions[index]}" for index in best)]
    large = [cell.resize((2 * SIZE_PX, 2 * SIZE_PX), Image.Resampling.LANCZOS) for cell in cells]
    return contact_sheet(large, labels, columns=1 + min(NEAREST, len(pictures)))


def learn_clip(work: Work, settings: ScratchSettings, terminal: Terminal) -> dict[str, float]:
    """Learn both towers, and publish them as a `CLIPModel` and, for the pipeline, its text tower."""
    scenes, device, tokenizer = work.result("scenes"), device_of(settings.machine), read_tokenizer(work)
    training, judging = read_pictures(scenes, "train"), read_pictures(scenes, "held-out", JUDGED)
    tokens = tokens_of(tokenizer, training.captions)  # (N, 32)
    ends = (tokens == tokenizer.eos_token_id).int().argmax(dim=1)  # (N,)
    answered = torch.tensor([answers(scene) for scene in training.scenes])  # (N, questions)
    torch.manual_seed(settings.clip.seed)
    clip = build(settings.clip, tokenizer)
    pupil = Pupil(clip).to(device)
    if device.type == "cpu":
        clip.set_attn_implementation("eager")  # the fused kernel's backward pass is slow for small heads on a CPU

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        random = torch.Generator().manual_seed(settings.clip.seed * 1_000_003 + step)
        which = torch.randint(len(training), (settings.clip.batch_size,), generator=random)
        room = tokens.shape[1] - ends[which]
        places = ends[which] + (torch.rand(len(which), generator=random) * room).long()  # the end or a token after it
        output = clip(input_ids=tokens[which].to(device), pixel_values=training.floats(which).to(device))
        contrast = contrastive_loss(output.text_embeds, output.image_embeds, clip.logit_scale)
        states = output.text_model_output.last_hidden_state[torch.arange(len(which)), places.to(device)]  # (B, width)
        naming = naming_loss(pupil.naming(states), answered[which].to(device))
        noted = {"naming": float(naming.detach()), "scale": float(clip.logit_scale.detach().exp())}
        return contrast + settings.clip.naming_weight * naming, noted

    def judge() -> tuple[dict[str, float], Image.Image]:
        ids = tokens_of(tokenizer, judging.captions).to(device)
        output = clip(input_ids=ids, pixel_values=judging.floats(slice(None)).to(device))
        found, possible = top1(output.text_embeds.float(), output.image_embeds.float(), judging.captions)
        logits = pupil.naming(output.text_model_output.last_hidden_state[:, -1])
        named = torch.stack([own.argmax(dim=1) for own in by_question(logits)], dim=1).cpu()
        right = (named == torch.tensor([answers(scene) for scene in judging.scenes])).all(dim=1)
        figures = {f"top1_in_{len(judging)}": found, "possible": possible, "named": float(right.float().mean())}
        return figures, nearest(output.text_embeds.cpu(), output.image_embeds.cpu(), judging)

    inputs = work.inputs("clip")
    lesson = Lesson("clip", pupil, settings.clip, loss, judge, {"inputs": inputs})
    figures = learn(lesson, work.of("clip"), settings.machine, terminal)
    figures["parameters"] = sum(item.numel() for item in clip.parameters())
    work.publish("clip", settings, clip_files(clip), figures, inputs)
    return figures


def clip_files(clip: CLIPModel) -> dict[str, bytes]:
    """``config.json`` and weights of the whole model, what its image processor does, and ``text/``: the text tower alone."""
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIZE_PX},
        "do_center_crop": True, "crop_size": {"height": SIZE_PX, "width": SIZE_PX}, "do_rescale": True,
        "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(text_tower_state(clip))
    contents = {f"text/{name}": data for name, data in transformers_files(text).items()}
    return {**transformers_files(clip), "preprocessor_config.json": json.dumps(processor, indent=2).encode(), **contents}


def text_tower_state(clip: CLIPModel) -> dict[str, Tensor]:
    """The text tower's tensors under the names of `CLIPTextModel`."""
    state = clip.text_model.state_dict()
    wanted = CLIPTextModel(clip.config.text_config).state_dict()
    prefix = "text_model." if next(iter(wanted)).startswith("text_model.") else ""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def transformers_files(model: torch.nn.Module) -> dict[str, bytes]:
    """A transformers component's folder, in fp16."""
    weights = {key: value.detach().cpu().half().contiguous() for key, value in model.state_dict().items()}
    # The files are fp16; as such the tower would be loaded by default, beside a U-Net that diffusers loads in fp32.
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    return {
        "config.json": json.dumps(config, indent=2, default=str).encode(),
        "model.safetensors": safetensors.torch.save(weights, {"format": "pt"}),
    }


def read_text_tower(work: Work) -> CLIPTextModel:
    """The published text tower, in fp32."""
    return CLIPTextModel.from_pretrained(work.result("clip").folder / "text", dtype=torch.float32).eval()


@torch.no_grad()
def embed(
    text: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str], settings: ScratchSettings,
    report: Callable[[int], None] = lambda done: None,
) -> Tensor:  # fmt: skip
    """What the U-Net reads of captions, (B, 32, width) in bf16; ``report`` is told how many are done."""
    device = text.device
    parts = []
    for start in range(0, len(captions), 256):
        ids = tokens_of(tokenizer, captions[start : start + 256]).to(device)
        with precision_of(settings.machine, device):
            parts.append(text(ids).last_hidden_state.bfloat16())
        report(start + len(ids))
    return torch.cat(parts)
