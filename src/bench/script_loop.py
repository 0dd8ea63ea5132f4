"""The loop of diffusers' ``examples/text_to_image/train_text_to_image_lora.py`` (0.42), operation by operation: what every
step of it computes, with the same libraries, and nothing of what it does beside (logging, checkpoints, validation)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


class ScriptLoop:
    """Trains a LoRA on a folder of pictures with metadata.jsonl, as the script does by its defaults."""

    def __init__(self, model: str, data: Path, size_px: int, batch_size: int, rank: int, precision: str) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(mixed_precision=precision, cpu=True)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
        self.tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
        self.vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
        unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
        for part in (self.text_encoder, self.vae, unet):
            part.requires_grad_(False).to(dtype=self.dtype)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
        self.learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(self.learning, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        pictures = _Pictures(data, rows, size_px, self.tokenizer)
        loader = torch.utils.data.DataLoader(pictures, shuffle=True, collate_fn=_collate, batch_size=batch_size)
        self.unet, self.optimizer, self.loader = self.accelerator.prepare(unet, optimizer, loader)
        self.unet.train()

    def steps(self, count: int) -> Iterator[float]:
        """The loss of each step, when it is done."""
        while True:
            for batch in self.loader:
                yield self._step(batch)
                count -= 1
                if not count:
                    return

    def _step(self, batch: dict[str, Tensor]) -> float:
        with self.accelerator.accumulate(self.unet):
            latents = (
                self.vae.encode(batch["pixel_values"].to(self.dtype)).latent_dist.sample() * self.vae.config.scaling_factor
            )
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (latents.shape[0],)).long()
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            text = self.text_encoder(batch["input_ids"], return_dict=False)[0]
            prediction = self.unet(noisy, timesteps, text, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), noise.float())
            mean = self.accelerator.gather(loss.repeat(latents.shape[0])).mean().item()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.learning, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return mean


class _Pictures(torch.utils.data.Dataset):
    """Pictures are opened, scaled, cropped and tokenised at each visit."""

    def __init__(self, folder: Path, rows: list[dict[str, str]], size_px: int, tokenizer: Any) -> None:
        self.folder, self.rows, self.size_px, self.tokenizer = folder, rows, size_px, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with Image.open(self.folder / self.rows[index]["file_name"]) as opened:
            picture = ImageOps.fit(opened.convert("RGB"), (self.size_px, self.size_px), Image.Resampling.LANCZOS)
        levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = levels.view(self.size_px, self.size_px, 3).permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)
        tokens = self.tokenizer(
            self.rows[index]["text"], max_length=self.tokenizer.model_max_length, padding="max_length", truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        return {"pixel_values": pixels, "input_ids": tokens.input_ids[0]}


def _collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
