"""LoRA, LoHa, LoKr and DoRA: the changes and their files."""
