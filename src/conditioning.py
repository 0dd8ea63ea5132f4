"""Prompts -> embeddings: for one or two text encoders, of any length, weighted as A1111 weights them.

A CLIP text encoder reads a window of 77 tokens: begin, 75 of text, end. A longer prompt is cut into chunks, each is
encoded by itself, and the embeddings are joined along the tokens. Letters: B images, N chunks, T window, D width.

Each text is encoded alone, never beside others in a batch: an image's embedding, to the last bit, must not depend on
what else was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from src.errors import usage_error
from src.prompts import Chunk, Segment, chunk_prompt, parse_weights

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline

COMMA_TOKEN = ",</w>"


@dataclass(frozen=True, slots=True)
class Embedding:
    """A text as the U-Net reads it: ``tokens`` (N*T, D) and, for SDXL, the pooled vector (D2,)."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Embedding:
        """The same on a device, in a precision."""
        return Embedding(self.tokens.to(device, dtype), None if self.pooled is None else self.pooled.to(device, dtype))


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What one image is drawn towards and away from; both of the same length."""

    positive: Embedding
    negative: Embedding

    @property
    def length(self) -> int:
        return self.positive.tokens.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """The same where, and in the precision that, the U-Net computes in."""
        return Conditioning(self.positive.to(device, dtype), self.negative.to(device, dtype))


def encode(pipeline: Pipeline, prompt: str, negative_prompt: str, *, clip_skip: int = 1, weighted: bool = True) -> Conditioning:
    """Encode a prompt and its negative; the shorter one is filled up with empty chunks.

    ``clip_skip`` counts as A1111 does: 1 takes the last layer, 2 the one before. SDXL was trained on the last but one:
    there 1 and 2 both mean that layer. ``weighted=False`` takes brackets literally.

    SDXL's negative is all zeros when it is empty and the model says so (``force_zeros_for_empty_prompt``), as in
    diffusers and A1111.
    """
    prompts = (prompt, negative_prompt)
    count = max(count_chunks(pipeline, text, weighted=weighted) for text in prompts)
    with torch.no_grad():
        positive, negative = (embed(pipeline, text, count, clip_skip=clip_skip, weighted=weighted) for text in prompts)
    if positive.pooled is not None and not negative_prompt and pipeline.config.get("force_zeros_for_empty_prompt"):
        negative = Embedding(torch.zeros_like(negative.tokens), torch.zeros_like(negative.pooled))
    return Conditioning(positive, negative)


def count_chunks(pipeline: Pipeline, text: str, *, weighted: bool = False) -> int:
    """How many windows of the text encoders a text fills: at least one."""
    return max(map(len, _chunk_for_all(pipeline, text, weighted)))


def token_places(pipeline: Pipeline, text: str, *, weighted: bool = True) -> list[tuple[str, int]]:
    """The tokens of a text, as the vocabulary writes them, and where each lies among the N*T that the U-Net reads.

    Both encoders of SDXL cut a text alike: their tokenizers differ in nothing but padding.
    """
    tokenizer, encoder = _encoders(pipeline)[0]
    window = _window(tokenizer, encoder)
    chunks = _chunk_for_all(pipeline, text, weighted)[0]
    places = [
        (token, chunk * window + 1 + index) for chunk, item in enumerate(chunks) for index, token in enumerate(item.tokens)
    ]  # 1: the begin
    return list(zip(tokenizer.convert_ids_to_tokens([token for token, _ in places]), [place for _, place in places]))


def tokenize(pipeline: Pipeline, text: str) -> list[str]:
    """The tokens of a text that is no prompt: without weights, windows, begin and end."""
    tokenizer = pipeline.tokenizer
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def embed(pipeline: Pipeline, text: str, chunks: int, *, clip_skip: int = 1, weighted: bool = False) -> Embedding:
    """Embed one text by every encoder of the pipeline, filled up to ``chunks`` windows; with gradients, where they are on."""
    per_encoder = _chunk_for_all(pipeline, text, weighted)
    is_sdxl = len(per_encoder) == 2
    parts, pooled = [], None
    for (tokenizer, encoder), own_chunks in zip(_encoders(pipeline), per_encoder):
        ids, weights = _pad(tokenizer, encoder, own_chunks, chunks)
        output = encoder(ids.to(_device(pipeline, encoder)), output_hidden_states=True)
        hidden = _select_layer(encoder, output, clip_skip, is_sdxl)
        parts.append(_weigh(hidden, weights.to(hidden)).flatten(0, 1))  # (N, T, D) -> (N*T, D)
        if is_sdxl and hasattr(output, "text_embeds"):
            pooled = output.text_embeds[0]  # of the first chunk, as A1111 takes it
    return Embedding(torch.cat(parts, dim=-1), pooled)


def embedding_shape(pipeline: Pipeline, chunks: int) -> tuple[int, int]:
    """(N*T, D) of what :func:`embed` gives for so many windows."""
    encoders = _encoders(pipeline)
    return chunks * _window(*encoders[0]), sum(encoder.config.hidden_size for _, encoder in encoders)


def stack(conditionings: Sequence[Conditioning]) -> dict[str, torch.Tensor]:
    """Join images of one length to the embedding arguments of a diffusers pipeline: (B, N*T, D) and (B, D2)."""
    arguments = {
        "prompt_embeds": torch.stack([item.positive.tokens for item in conditionings]),
        "negative_prompt_embeds": torch.stack([item.negative.tokens for item in conditionings]),
    }
    if conditionings[0].positive.pooled is not None:
        arguments["pooled_prompt_embeds"] = torch.stack([item.positive.pooled for item in conditionings])
        arguments["negative_pooled_prompt_embeds"] = torch.stack([item.negative.pooled for item in conditionings])
    return arguments


def _encoders(pipeline: Pipeline) -> list[tuple[CLIPTokenizer, CLIPTextModel]]:
    pairs = [(pipeline.tokenizer, pipeline.text_encoder)]
    if getattr(pipeline, "text_encoder_2", None) is not None:
        pairs.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    return pairs


def _chunk_for_all(pipeline: Pipeline, text: str, weighted: bool) -> list[list[Chunk]]:
    """Chunk one text for each of the pipeline's encoders."""
    segments = parse_weights(text) if weighted else [Segment(text, 1.0)]
    return [_chunk(tokenizer, encoder, segments) for tokenizer, encoder in _encoders(pipeline)]


def _chunk(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, segments: list[Segment]) -> list[Chunk]:
    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False).input_ids

    comma = tokenizer.get_vocab().get(COMMA_TOKEN)
    return chunk_prompt(segments, tokenize, comma, window=_window(tokenizer, encoder) - 2)


def _window(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> int:
    """Tokens that the encoder reads at once, begin and end included."""
    return min(tokenizer.model_max_length, encoder.config.max_position_embeddings)


def _device(pipeline: Pipeline, encoder: CLIPTextModel) -> torch.device:
    """Where the encoder computes; a hook brings an offloaded one to where the pipeline runs."""
    is_offloaded = any(hasattr(module, hook) for module in encoder.modules() for hook in ("_hf_hook", "_diffusers_hook"))
    return pipeline._execution_device if is_offloaded else encoder.device


def _pad(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, chunks: list[Chunk], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (N, T) with begin, end and padding, and the weight of each (N, T); what is not text weighs 1."""
    length = _window(tokenizer, encoder)
    ids, weights = [], []
    for chunk in [*chunks, *[Chunk((), ())] * (count - len(chunks))]:
        missing = length - 2 - len(chunk.tokens)
        ids.append([tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * missing])
        weights.append([1.0, *chunk.weights, 1.0, *[1.0] * missing])
    return torch.tensor(ids), torch.tensor(weights)


def _select_layer(encoder: CLIPTextModel, output: object, clip_skip: int, is_sdxl: bool) -> torch.Tensor:
    """The layer (N, T, D) that the U-Net was trained on, or an earlier one; SD1 and SD2 normalise it, SDXL does not."""
    layers = len(output.hidden_states) - 1  # the first is the input
    if clip_skip > layers:
        raise usage_error(f"clip skip {clip_skip}: this model's text encoder has {layers} layers; use 1 to {layers}")
    if is_sdxl:
        return output.hidden_states[-max(clip_skip, 2)]
    if clip_skip == 1:
        return output.last_hidden_state
    transformer = getattr(encoder, "text_model", encoder)  # CLIPTextModel lost this level in transformers 5
    return transformer.final_layer_norm(output.hidden_states[-clip_skip])


def _weigh(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply each token by its weight and give each chunk its mean back: A1111's "original" emphasis."""
    if torch.all(weights == 1):
        return hidden  # exactly the plain embedding
    weighted = hidden * weights[..., None]
    before = hidden.float().mean(dim=(1, 2), keepdim=True)
    after = weighted.float().mean(dim=(1, 2), keepdim=True)
    return weighted * (before / after).to(hidden.dtype)
