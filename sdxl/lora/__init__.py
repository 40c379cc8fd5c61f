"""LoRA, LoHa, LoKr and DoRA: the changes, their files, and files combined."""
