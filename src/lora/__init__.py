"""LoRA adapters: what their formats look like, reading, attaching, exchanging, saving, and the tool ``python -m src.lora``."""
