"""Predictions from a weight file or an ONNX file: the same preprocessing, the same names.

Both kinds of file carry names and preprocessing in their metadata, so nothing else is needed. An ONNX file of
somebody else's may be a tagger of the WD form (models/wd_file.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from torch import Tensor

from models.image_model import ImageModel, OnnxForm
from models.outputs import OUTPUTS, Columns, RowOptions
from models.wd_file import read_wd_metadata
from utils.canvas import DEFAULT, Background
from utils.config.bounds import Side
from utils.errors import UserError
from utils.io.onnx_file import refuse_external_data, unreadable_onnx
from utils.record.logging import get_logger
from utils.vocabulary import GENERAL, RATING

log = get_logger(__name__)


_Size = Annotated[list[Side], Field(min_length=2, max_length=2)]


class _Preprocessing(BaseModel):
    """The preprocessing that a file states; the file may come from a stranger.

    buckets_hw: the sizes that images are grouped in; programs that show one size pad to a square.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    image_size_hw: _Size
    buckets_hw: Annotated[list[_Size], Field(min_length=1)] | None = None
    interpolation: Literal["bilinear", "bicubic", "lanczos", "area"]
    pad: Literal["none", "square"] = "none"
    eval_resize: Literal["crop", "squash"] = "crop"
    eval_crop: Annotated[float, Field(gt=0.01, le=1)]
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    channels: Literal[1, 3]
    background: Background = DEFAULT
    icc: bool = False
    shortest_px: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_per_channel(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"{len(self.mean)} numbers in mean and {len(self.std)} in std, for {self.channels} channels"
            )
        return self


class _Metadata(BaseModel):
    """The metadata that a prediction needs; a file may have more. Of tags: the categories and thresholds of each."""

    model_config = ConfigDict(strict=True)

    preprocessing: _Preprocessing
    form: OnnxForm | None = None
    tag_categories: list[int] | None = None
    tag_counts: list[int] | None = None
    tag_ids: list[int] | None = None
    thresholds: list[Annotated[float, Field(ge=0, le=1)]] | None = None

    @model_validator(mode="after")
    def _one_per_tag(self) -> Self:
        count = len(getattr(self, "tag_names", ()))
        for name in ("tag_categories", "tag_counts", "tag_ids", "thresholds"):
            if (found := getattr(self, name)) is not None and len(found) != count:
                raise ValueError(f"{len(found)} {name} for {count} tags")
        return self


_Names = Annotated[list[str], Field(min_length=1)]
_SCHEMAS = {
    name: create_model("_Named", __base__=_Metadata, **{output.names_key: (_Names, ...)})
    for name, output in OUTPUTS.items()
    if output.names_key is not None
}


def check_metadata(path: Path, key: str, metadata: Any) -> None:
    """Raise UserError (`key`) that names the first wrong value of a file's metadata."""
    output = metadata.get("output") if isinstance(metadata, dict) else None
    try:
        _SCHEMAS.get(output, _Metadata).model_validate(metadata)
    except ValidationError as error:
        raise wrong_metadata(path, key, error) from None


def wrong_metadata(path: Path, key: str, error: ValidationError) -> UserError:
    """Return the error for wrong metadata of a file."""
    first = error.errors()[0]
    parts = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return UserError(f"{key}: {path} has wrong metadata ({': '.join(filter(None, parts))}); make the file again")


class Predictor:
    """Predictions for batches of uint8 images; `names` of the outputs and `preprocessing` as in training.

    vocabulary: the hash of what a tagger was trained on, where its file states it. thresholds: [K], or None.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = dict(metadata)
        self.output, self.has_tags = OUTPUTS[metadata["output"]], metadata["output"] == "tags"
        self.names: list[str] = [] if self.output.names_key is None else list(metadata[self.output.names_key])
        self.categories = np.array(metadata.get("tag_categories") or [GENERAL] * len(self.names))
        counts = np.array(metadata.get("tag_counts") or [1] * len(self.names))
        self.has_ratings = bool(counts[self.categories == RATING].any())
        self.thresholds: list[float] | None = metadata.get("thresholds")
        self.vocabulary: str | None = metadata.get("vocabulary")
        self.preprocessing: dict[str, Any] = dict(metadata["preprocessing"])

    def predict(self, images: Tensor) -> np.ndarray:
        """Return probabilities float32 [B, K], or features [B, C], of uint8 images [B, C, H, W]."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> np.ndarray:
        """Return embeddings float32 [B, D] of uint8 images [B, C, H, W]. Raises UserError (`weights`) without any."""
        raise NotImplementedError

    def rows(self, images: Tensor, options: RowOptions) -> list[dict[str, Any]]:
        """Return what is written of each of some uint8 images [B, C, H, W]."""
        columns = Columns(self.names, self.categories, self.has_ratings)
        return [self.output.make_row(values, columns, options) for values in self.predict(images)]


class TorchPredictor(Predictor):
    """Predict with a model that was rebuilt from a weight file."""

    def __init__(self, model: ImageModel, metadata: Mapping[str, Any], device: torch.device) -> None:
        super().__init__(metadata)
        self._model, self._device = model.to(device), device

    @torch.inference_mode()
    def predict(self, images: Tensor) -> np.ndarray:
        """Return the predictions."""
        return self._model(images.to(self._device))[-1].cpu().numpy()

    @torch.inference_mode()
    def embed(self, images: Tensor) -> np.ndarray:
        """Return the embeddings."""
        return self._model.embed(images.to(self._device)).cpu().numpy()


class OnnxPredictor(Predictor):
    """Predict with an ONNX file in ONNX Runtime. Raises UserError (`key`) where it cannot be read."""

    def __init__(self, path: Path, device: torch.device, key: str = "weights") -> None:
        self._path, self._session = path, _open_session(path, device, key)
        metadata = _read_metadata(path, key, self._session)
        super().__init__(metadata)
        plain = {"outputs": {name: name for name in self.output.heads}}
        self._form = OnnxForm.model_validate(metadata.get("form") or plain)
        self._name = next((name for name, what in self._form.outputs.items() if what == self.output.heads[-1]), "probs")
        self._check_graph(path, key)

    def _check_graph(self, path: Path, key: str) -> None:
        """Raise UserError where the graph is not images -> outputs of the metadata's names."""
        inputs = [(value.name, value.type) for value in self._session.get_inputs()]
        outputs = {value.name: value.shape for value in self._session.get_outputs()}
        shape, taken = outputs.get(self._name, []), [(self._form.input, "tensor(float)")]
        if inputs != taken or len(shape) != 2 or (self.names and shape[1] != len(self.names)):
            wanted = len(self.names) if self.names else "C"
            raise UserError(
                f"{key}: {path} has the inputs {inputs} and the outputs {outputs}; a file that export.py made takes "
                f"'{self._form.input}', tensor(float), and gives '{self._name}', [batch, {wanted}]"
            )

    def predict(self, images: Tensor) -> np.ndarray:
        """Return the predictions."""
        return self._run(self._name, images)

    def embed(self, images: Tensor) -> np.ndarray:
        """Return the embeddings."""
        there = [value.name for value in self._session.get_outputs()]
        found = [name for name, what in self._form.outputs.items() if what in ("embedding", "features")]
        if not found or found[0] not in there:
            raise UserError(
                f"weights: {self._path} has no embedding among its outputs, {', '.join(there)}; name the run, or "
                "export it with format=wd14 or imgutils, or backbone_only=true"
            )
        return self._run(found[0], images)

    def _run(self, name: str, images: Tensor) -> np.ndarray:
        taken = self._form.to_input(images.cpu().float() / 255.0).numpy()
        one = self._session.get_inputs()[0].shape[0] == 1  # older WD files take one image at a time
        parts = np.split(taken, len(taken)) if one else [taken]
        return np.concatenate([self._session.run([name], {self._form.input: part})[0] for part in parts])


def _open_session(path: Path, device: torch.device, key: str) -> Any:
    """Return ONNX Runtime's session of a file; on the CPU, with a warning, where its CUDA libraries are missing."""
    import onnxruntime

    refuse_external_data(path, key)
    # ONNX Runtime lists the providers that it was built with, not those that work here: torch knows that.
    providers = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    if providers:
        onnxruntime.preload_dlls()  # CUDA's libraries, from their packages
    try:
        session = onnxruntime.InferenceSession(path, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # its classes have no base of their own
        raise unreadable_onnx(path, key, error) from None
    if not set(providers) <= set(session.get_providers()):
        log.warning(
            "%s: ONNX Runtime cannot load its CUDA libraries, so %s runs on the CPU; "
            "pip install 'onnxruntime-gpu[cuda,cudnn]' installs them", key, path,
        )  # fmt: skip
    return session


def _read_metadata(path: Path, key: str, session: Any) -> dict[str, Any]:
    """Return the metadata of a file of ours, or what the WD form stands for."""
    found = session.get_modelmeta().custom_metadata_map
    try:
        metadata = json.loads(found["atelier"]) if "atelier" in found else None
    except (ValueError, RecursionError) as error:
        raise unreadable_onnx(path, key, error) from None
    if "atelier" not in found:
        metadata = read_wd_metadata(path, key, session.get_inputs(), session.get_outputs())
    check_metadata(path, key, metadata)
    if metadata.get("output") not in OUTPUTS:
        raise UserError(f"{key}: {path} has wrong metadata (output: {metadata.get('output')!r}); export it again")
    return metadata
