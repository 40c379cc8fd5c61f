"""ONNX Runtime against eager PyTorch on the CPU, fp32: milliseconds per batch, ratio with its spread.

python bench/onnx_speed.py [quick]          (on an idle machine; five minutes on two CPU cores)

Ours is the file that export.py writes, in ONNX Runtime at its defaults. Theirs is the same network in eager PyTorch
under inference_mode, in the faster of its two memory formats. Both sides get float32 images on the host, return logits
and probabilities, and use all cores. The compiled network is given beside them, because a user of PyTorch would try it
next; it is not part of the ratio.
"""

import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.measure import describe_machine, read_group, row_of, take_turns, write
from engine.runtime import can_compile
from models.build import build_network
from models.config import ModelConfig
from models.export.onnx_file import OnnxSettings, export_onnx, open_session
from models.image_model import ImageModel
from models.normalise import Normalise

MEAN, STD, CLASSES = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 1000
CPU = torch.device("cpu")


def make_model(name):
    """Return a size with drawn weights, and the metadata of an export."""
    torch.manual_seed(0)
    network = build_network(read_group(ModelConfig, "model", name), CLASSES)
    preprocessing = {"image_size_hw": [224, 224], "mean": MEAN, "std": STD, "channels": 3, "eval_crop": 0.875,
                     "interpolation": "bicubic"}  # fmt: skip
    model = ImageModel(network, Normalise(MEAN, STD, 3), "classes").eval()
    return model, {"preprocessing": preprocessing, "model": {"name": name}, "output": "classes", "step": 0}


def eager_turn(model, images):
    """Return a function that runs a model once."""

    def turn():
        with torch.inference_mode():
            model(images)

    return turn


def repeat(turn, steps):
    """Return a function that runs a batch several times."""

    def run():
        for _ in range(steps):
            turn()

    return run


def measure(name, batch_size, session, model, *, quick):
    """Return the row of one network and batch size, and the medians of all sides."""
    images = torch.rand(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    channels_last = images.contiguous(memory_format=torch.channels_last)
    pixels = images.numpy()
    sides = {
        "onnxruntime": lambda: session(pixels),
        "eager": eager_turn(model, images),
        "eager channels_last": eager_turn(model, channels_last),
    }
    if not quick and can_compile("cpu"):
        sides["compiled"] = eager_turn(torch.compile(model), channels_last)
    steps, turns = (1, 2) if quick else (20 if batch_size == 1 else 3, 7)
    turns_of = {side: repeat(turn, steps) for side, turn in sides.items()}
    found = take_turns(turns_of, steps=steps, warmup=1, turns=turns, device=CPU, pause_sec=0.3)
    medians = {side: round(statistics.median(values), 2) for side, values in found.items()}
    best = min(("eager", "eager channels_last"), key=medians.__getitem__)
    row = row_of(f"{name}, 224 px, batch {batch_size}", found, "onnxruntime", best)
    return {**row, "all_ms": medians, "speed": round(1 / row["ratio"], 2)}


def main():
    quick = "quick" in sys.argv[1:]
    rows = []
    for name in ("convnextv2_atto",) if quick else ("convnextv2_atto", "convnextv2_tiny"):
        model, metadata = make_model(name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_onnx(model, metadata, path, OnnxSettings())
            session = open_session(path)
            for batch_size in (1,) if quick else (1, 16):
                rows.append(measure(name, batch_size, session, model, quick=quick))
    write("onnx_speed", rows, quick=quick, machine=describe_machine(CPU))


if __name__ == "__main__":
    main()
