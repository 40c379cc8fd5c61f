"""Export a model to one ONNX file, compared with PyTorch before it is kept.

input     images  float32 [batch, C, H, W], RGB in [0, 1]; the normalisation is inside
outputs   logits, probs  float32 [batch, K]; or features  float32 [batch, C]
metadata  `atelier`: JSON with output, names and preprocessing
"""

import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.image_model import OUTPUT_NAMES, ImageModel
from models.predictor import NAME_KEYS
from utils.errors import UserError

OPSET = 18
_MAX_BYTES = 2**31 - 2**22  # protobuf's limit is 2 GiB; 4 MiB are for the graph itself
# Batch sizes that are compared.
_CHECKED_BATCHES = (1, 5)


def export_model(model: ImageModel, metadata: dict[str, Any], path: Path, tolerance: float, seed: int = 0) -> float:
    """Write the file and return the greatest difference of its outputs from PyTorch's.

    Raises UserError (`tolerance`) where they differ by more; then no file is written and an old one stays. Raises
    UserError (`run_dir`) before any work where the weights exceed the size of an ONNX file.
    """
    _refuse_large(model, metadata, path)
    preprocessing = metadata["preprocessing"]
    height, width = preprocessing["image_size_hw"]
    generator = torch.Generator().manual_seed(seed)
    samples = [
        torch.rand(size, preprocessing["channels"], height, width, generator=generator) for size in _CHECKED_BATCHES
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        temporary = Path(folder) / path.name
        _write(model, samples[-1], metadata, temporary)
        difference = max(_difference(model, temporary, sample) for sample in samples)
        if not difference <= tolerance:
            raise UserError(
                f"tolerance: ONNX Runtime differs from PyTorch by {difference:.2e}, more than {tolerance:.0e}; "
                "the file was not kept. Raise tolerance if that is small enough for you"
            )
        os.replace(temporary, path)
    return difference


def _refuse_large(model: ImageModel, metadata: dict[str, Any], path: Path) -> None:
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > _MAX_BYTES:
        name = metadata.get("model", {}).get("name", "the network")
        raise UserError(
            f"run_dir: {name} has {size / 2**30:.2f} GiB of weights and one ONNX file holds at most 2 GiB, so {path} "
            "cannot be written; export a smaller network (model=convnextv2_large, say), or predict with the weights "
            "themselves: predict.py weights=RUN"
        )


def _write(model: ImageModel, sample: torch.Tensor, metadata: dict[str, Any], path: Path) -> None:
    import onnx

    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporter, which a user cannot change
            program = torch.onnx.export(
                model,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=list(OUTPUT_NAMES[model.output]),
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    finally:
        exporter.setLevel(level)
    proto = program.model_proto
    keys = ("output", NAME_KEYS.get(model.output), "preprocessing", "step")
    kept = {key: metadata[key] for key in keys if key in metadata}
    onnx.helper.set_model_props(proto, {"atelier": json.dumps(kept)})
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


@torch.inference_mode()
def _difference(model: ImageModel, path: Path, sample: torch.Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(list(OUTPUT_NAMES[model.output]), {"images": sample.numpy()})
    wanted = [output.numpy() for output in model(sample)]
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted))
