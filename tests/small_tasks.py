"""Each task in small, with a batch of grey images: for tests of what all tasks share."""

from pkgutil import resolve_name

import torch

from bench.measure import read_group
from data.stream.batch import Ragged, collate
from engine.tasks.fcmae import patch_count
from engine.tasks.kind import Setup, open_kind
from engine.tasks.kinds import KINDS
from models.config import ModelConfig
from sdxl.files import family as sdxl_family
from utils.formats.vocabulary import Vocabulary

OF_DIFFUSERS = ("diffusion", "autoencoder")
NOISE = {
    "prediction_type": "v_prediction", "zero_terminal_snr": True, "convert": False, "offset": 0.0, "perturbation": 0.0,
    "multires_iterations": 0, "multires_discount": 0.3,
}  # fmt: skip
CHANGES = {
    "classification": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "fcmae": {"decoder_dim": 16},
    "regression": {},
    "tagging": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "diffusion": {"latent_cache": None, "noise": NOISE},
    "autoencoder": {"discriminator": {"weight": 0.5, "start_step": 1}},
}
SIZE, BATCH, NAMES = 64, 4, [f"name {index}" for index in range(7)]


def make_setup(task):
    """Return the kind and the setup of a task, by name; `test_resnet` is a classifier with batch norm."""
    if task == "test_resnet":
        model, task = read_group(ModelConfig, "model", "timm", name="test_resnet"), "classification"
    else:
        small = {"depths": [1, 1], "dims": [8, 16], "stem_stride": 2, "drop_path_rate": 0.1}
        model = read_group(ModelConfig, "model", "convnextv2_atto", **small)
    kind = open_kind(task)
    if task in OF_DIFFUSERS:
        model = read_group(kind.model, "model", "sdxl_tiny")
    config = read_group(resolve_name(KINDS[task].config), "task", task, **CHANGES[task])
    preprocessing = {"image_size_hw": [SIZE, SIZE], "mean": [0.5] * 3, "std": [0.25] * 3, "channels": 3}
    facts = dict.fromkeys(kind.names, NAMES)
    if task == "regression":
        facts = {"target_scale": [3.0, 2.0]}
    if task == "tagging":
        orientation = {"pairs": [[4, 5]], "dropped": [6], "no_flip": [6]}
        facts = Vocabulary(tuple(NAMES), (9, 9, 9, 9, 0, 0, 4), (5,) * 7, tuple(range(7))).facts()
        facts |= {"orientation": orientation, "tag_priors": [0.1] * 7}
    return kind, Setup(model, config, preprocessing, facts)


def patch_configs():
    """Give the tiny SDXL of this process one layer in place of equal ones: each takes seconds of fake tensors."""
    list_configs, one = sdxl_family.list_configs, {"transformer_layers_per_block": [1] * 3, "layers_per_block": 1}
    sdxl_family.list_configs = lambda **size: (found := list_configs(**size)) | {"unet": found["unet"] | one}


def make_batch(task, setup, device):
    """Return a batch as the loader makes it, on the device."""
    samples = []
    for number in range(BATCH):
        images = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
        sample = {"sample_id": number, "key": number, "weight": 1.0, "images": images, "labels": number % 3}
        if task == "fcmae":
            sample["mask"] = torch.zeros(patch_count(setup.model, setup.task, [SIZE, SIZE]), dtype=torch.bool)
        if task == "regression":
            sample["labels"] = torch.tensor([float(number)])
        if task == "tagging":
            sample["tags"] = Ragged(torch.zeros(number, dtype=torch.int64))
            sample["unknown_tags"] = Ragged(torch.zeros(1, dtype=torch.int64))
        if task == "diffusion":
            sample |= {"fit": torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE]), "token_ids": torch.zeros(1, 77).long()}
            sample |= {"is_dropped": False, "strata": torch.tensor([number, BATCH])}
        samples.append(sample)
    return {name: tensor.to(device) for name, tensor in collate(samples, len(samples), channels_last=True).items()}
