"""Files of SDXL: the layouts of others, names of tensors, networks, tokenizers, facts in headers."""
