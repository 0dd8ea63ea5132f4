"""Training a LoRA: caches, the network that learns, the loop, checkpoints, judging, the report."""
