"""The CLIP score: that of torchmetrics, and a refusal."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from models.sdxl.clip_score import clip_scores
from utils.errors import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("open_clip")


def test_it_is_the_cosine_of_the_two_embeddings(tmp_path):
    from models.sdxl.tokenizer import build_tokenizer

    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=part, vision_config={**part, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    torch.manual_seed(6)
    model = transformers.CLIPModel(config).eval().requires_grad_(False)
    model.text_projection.weight.neg_()  # drawn so, all cosines are negative, which count as 0
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(**size), build_tokenizer())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 32, 3), dtype=np.uint8)
    texts = ["a cat", "black", "a white circle"]
    found = clip_scores(tmp_path, "task.samples.clip", pictures, texts, torch.device("cpu"))
    for score, picture, text in zip(found, pictures, texts):
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        image = model.get_image_features(pixel_values=inputs["pixel_values"])
        words = model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        image, words = (getattr(part, "pooler_output", part) for part in (image, words))
        assert score == pytest.approx(max(0.0, 100 * float(functional.cosine_similarity(image, words))), abs=1e-3)
    assert max(found) > 0


def test_a_folder_without_a_clip_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"task\.samples\.clip: .* is no folder of a CLIPModel"):
        clip_scores(tmp_path, "task.samples.clip", np.zeros((1, 8, 8, 3), np.uint8), ["a"], torch.device("cpu"))
