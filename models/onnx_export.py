"""Export a classifier to one ONNX file, compared with PyTorch before it is kept.

input   images  float32 [batch, C, H, W], RGB in [0, 1]; the normalisation is inside
outputs logits, probs   float32 [batch, K]
metadata  `atelier`: JSON with class_names and preprocessing
"""

import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from models.predictor import Classifier
from utils.errors import UserError

OPSET = 18
_MOST_BYTES = 2**31 - 2**22  # protobuf takes 2 GiB; the graph itself is given 4 MiB
# Sizes that a dynamic batch must serve.
_CHECKED_BATCHES = (1, 5)


def export_classifier(
    classifier: Classifier, metadata: dict[str, Any], path: Path, tolerance: float, seed: int = 0
) -> float:
    """Write the file and return the greatest difference of logits and probabilities from PyTorch's.

    Raises UserError (`tolerance`) where they differ by more; then no file is left and an old one stays. Raises
    UserError (`run_dir`) before any work where the weights are larger than an ONNX file may be.
    """
    _refuse_large(classifier, metadata, path)
    preprocessing = metadata["preprocessing"]
    height, width = preprocessing["image_size_hw"]
    generator = torch.Generator().manual_seed(seed)
    samples = [
        torch.rand(size, preprocessing["channels"], height, width, generator=generator) for size in _CHECKED_BATCHES
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        temporary = Path(folder) / path.name
        _write(classifier, samples[-1], metadata, temporary)
        difference = max(_difference(classifier, temporary, sample) for sample in samples)
        if not difference <= tolerance:
            raise UserError(
                f"tolerance: ONNX Runtime differs from PyTorch by {difference:.2e}, more than {tolerance:.0e}; "
                "the file was not kept. Raise tolerance if that is small enough for you"
            )
        os.replace(temporary, path)
    return difference


def _refuse_large(classifier: Classifier, metadata: dict[str, Any], path: Path) -> None:
    size = sum(tensor.nbytes for tensor in classifier.state_dict().values())
    if size > _MOST_BYTES:
        name = metadata.get("model", {}).get("name", "the network")
        raise UserError(
            f"run_dir: {name} has {size / 2**30:.2f} GiB of weights and one ONNX file holds at most 2 GiB, so {path} "
            "cannot be written; export a smaller network (model=convnextv2_large, say), or predict with the weights "
            "themselves: predict.py weights=RUN"
        )


def _write(classifier: Classifier, sample: torch.Tensor, metadata: dict[str, Any], path: Path) -> None:
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations; nothing that a user can act on
            program = torch.onnx.export(
                classifier,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits", "probs"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    finally:
        exporter.setLevel(level)
    proto = program.model_proto
    kept = {key: metadata[key] for key in ("class_names", "preprocessing", "step") if key in metadata}
    onnx.helper.set_model_props(proto, {"atelier": json.dumps(kept)})
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


@torch.inference_mode()
def _difference(classifier: Classifier, path: Path, sample: torch.Tensor) -> float:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(["logits", "probs"], {"images": sample.numpy()})
    wanted = [output.numpy() for output in classifier(sample)]
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted))
