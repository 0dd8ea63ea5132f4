"""A small Stable Diffusion from nothing: scenes -> tokenizer -> VAE -> CLIP -> U-Net -> a folder that any program loads."""
