"""SDXL: noise, targets and weights, conditioning, networks, their files, and LoRA."""
