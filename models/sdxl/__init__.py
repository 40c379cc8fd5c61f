"""SDXL: its networks, their files, text, noise, and LoRA."""
