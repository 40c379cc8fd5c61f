"""CLIP score: how well pictures fit their texts, by a CLIP that the user has.

Source: Hessel et al. 2021 (arXiv 2104.08718), equation 1. Differs: times 100, as torchmetrics has it, not 2.5.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError


@torch.no_grad()
def clip_scores(
    folder: Path, key: str, pictures: np.ndarray, texts: Sequence[str], device: torch.device
) -> list[float]:
    """Return the score of each picture, uint8 [N, H, W, 3], with its text: 0 to 100.

    folder: a CLIPModel and its processor, as transformers saves them. Raises UserError (`key`) where it is none.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {folder} is no folder of a CLIPModel with its processor ({str(error).splitlines()[0]}); name one, "
            "such as a copy of openai/clip-vit-large-patch14, or set it to null"
        ) from None
    inputs = processor(text=list(texts), images=list(pictures), return_tensors="pt", padding=True, truncation=True)
    with torch.autocast(device.type, enabled=False):
        found = model(**inputs.to(device))
    cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
    return (100 * cosine.clamp(min=0)).tolist()
