"""ONNX Runtime against PyTorch on the CPU, fp32: milliseconds per batch, ratio with its spread.

python bench/onnx_speed.py [quick]          (on an idle machine; five minutes on two CPU cores)

Ours is the file that export.py writes, in ONNX Runtime at its defaults. Theirs is the same network in PyTorch under
inference_mode: eager in both memory formats, and compiled. Both get float32 images on the host, return logits and
probabilities, and use all cores.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.finetune_step import CLASSES, MEAN, STD
from bench.measure import Comparison, read_group, run_bench
from engine.runtime import can_compile
from models.build import build_network
from models.config import ModelConfig
from models.export.onnx_file import OnnxSettings, export_onnx, open_session
from models.image_model import ImageModel
from models.normalise import Normalise


def make_model(name):
    """Return a network with drawn weights, and the metadata of an export."""
    torch.manual_seed(0)
    network = build_network(read_group(ModelConfig, "model", name), CLASSES)
    preprocessing = {"image_size_hw": [224, 224], "mean": MEAN, "std": STD, "channels": 3, "eval_crop": 0.875,
                     "interpolation": "bicubic"}  # fmt: skip
    model = ImageModel(network, Normalise(MEAN, STD, 3), "classes").eval()
    return model, {"preprocessing": preprocessing, "model": {"name": name}, "output": "classes", "step": 0}


@torch.inference_mode()
def call(model, images):
    """Run a model once."""
    return model(images)


def repeat(turn, count):
    """Make a turn several times."""
    for _ in range(count):
        turn()


def comparisons(_, quick):
    """Yield the networks and batch sizes."""
    for name in ("convnextv2_atto",) if quick else ("convnextv2_atto", "convnextv2_tiny"):
        model, metadata = make_model(name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_onnx(model, metadata, path, OnnxSettings())
            session = open_session(path)
            for batch_size in (1,) if quick else (1, 16):
                images = torch.rand(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
                last, pixels = images.contiguous(memory_format=torch.channels_last), images.numpy()
                networks = {"eager": (model, images), "eager channels_last": (model, last)}
                if not quick and can_compile("cpu"):
                    networks["compiled"] = torch.compile(model), last
                sides = {"onnxruntime": partial(session, pixels)}
                sides |= {side: partial(call, *given) for side, given in networks.items()}
                steps = 20 if batch_size == 1 else 3
                turns = {side: partial(repeat, turn, steps) for side, turn in sides.items()}
                yield Comparison(f"{name}, 224 px, batch {batch_size}", turns, steps)


if __name__ == "__main__":
    run_bench(comparisons, turns=7)
