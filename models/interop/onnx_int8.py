"""An ONNX file in int8: weights per output channel, maps by the range that they have for training images.

Static: the ranges are fixed in the file. Dynamic quantisation, which measures each map as it runs, is slower than
float32 for convolutions (docs/weights.md has the figures).
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from timeit import repeat
from types import SimpleNamespace

import numpy as np
import onnx
import torch
from torch import Tensor

from models.predictor import open_session
from utils.errors import UserError
from utils.record.logging import log

_TURNS = 30
_MOST_FALL = 0.005  # of top-1 or mAP
_QUANTISED = ["Conv", "MatMul", "Gemm", "Clip", "Relu", "MaxPool"]  # sums and norms between them stay in float32


@torch.inference_mode()
def to_int8(path: Path, images: Iterable[Tensor], score: Callable[[Path], float], what: str) -> str:
    """Replace an ONNX file of ours by its int8 form, and return how both compare.

    images: for the ranges of the maps, uint8 [B, C, H, W]. score: measures a file; what: names the score. Raises
    UserError (`precision`) if int8 is worse, or no faster for an image.
    """
    whole = path.rename(path.with_name("float.onnx"))
    _quantise(whole, path, images)
    scores = [*map(score, (whole, path))]
    taken = [*map(_time, (whole, path))]
    whole.unlink()
    text = "float32 {:.4f}, int8 {:.4f} ({}); an image takes {:.2f} ms, {:.2f} ms".format(*scores, what, *taken)
    if scores[1] < scores[0] - _MOST_FALL or taken[1] >= taken[0]:
        raise UserError(
            f"precision: int8 is not kept, as it may lose {_MOST_FALL} and must be faster on this machine: {text}; "
            "remove precision=int8"
        )
    log.info("%s", text)
    return text


def _quantise(source: Path, path: Path, images: Iterable[Tensor]) -> None:
    from onnxruntime.quantization import QuantType, quantize_static

    proto = onnx.load(source)
    # Else ONNX Runtime warns, and asks for its own preparation; the exporter has inferred shapes and folded constants.
    proto.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    quantize_static(
        proto,
        path,
        SimpleNamespace(get_next=partial(next, map(_to_input, images), None)),
        op_types_to_quantize=_QUANTISED,
        per_channel=True,
        reduce_range=True,  # products of 8 and 8 bits overflow on CPUs without VNNI: resnet18 fell from 0.98 to 0.59
        activation_type=QuantType.QUInt8,
    )


def _to_input(images: Tensor) -> dict[str, np.ndarray]:
    return {"images": (images.cpu().float() / 255.0).numpy()}


def _time(file: Path) -> float:
    session = open_session(file, "cpu")
    image = _to_input(torch.zeros(1, *session.get_inputs()[0].shape[1:]))
    return 1e3 * min(repeat(partial(session.run, ["logits"], image), number=1, repeat=_TURNS))
