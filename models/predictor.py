"""Predictions from a weight file or an ONNX file: the same preprocessing, the same names.

Both have names and preprocessing in their metadata, so nothing else is needed. A tagger of others has them beside it
(models/interop/foreign.py).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from models.interop.foreign import describe
from models.onnx_form import OnnxForm
from models.outputs import OUTPUTS, RowOptions
from utils.config.bounds import Fraction, Some
from utils.errors import UserError
from utils.formats.preprocessing import Preprocessing
from utils.formats.spelling import GENERAL, RATING
from utils.formats.thresholds import DEFAULT as DEFAULT_THRESHOLD
from utils.formats.thresholds import PER_TAG, find_thresholds
from utils.formats.vocabulary import FILE, Vocabulary, read_facts
from utils.io.files import Json, Values, readable, sha256_file
from utils.ranks.processes import map_parts
from utils.record.logging import log

if TYPE_CHECKING:
    import torch


Images = "np.ndarray | Tensor"  # an array or a tensor, uint8 [B, C, H, W]


class _Metadata(BaseModel):
    """The metadata that a prediction needs, except for the columns of tags. A file may have more."""

    model_config = ConfigDict(strict=True)

    output: str | None = None
    preprocessing: Preprocessing
    form: OnnxForm | None = None
    class_names: Some[str] | None = None
    thresholds: list[Fraction] | None = None


def check_metadata(path: Path, metadata: Any) -> None:
    """Raise UserError that names the first wrong value of a file's metadata."""
    with readable(path, "weight"):
        checked = _Metadata.model_validate(metadata)
    output = OUTPUTS.get(checked.output)
    if output is None:
        return
    if output.has_tags:
        read_facts(path, metadata)
    names = metadata.get(output.names_key) or ()
    if output.names_key and not len(checked.thresholds or names) == len(names) > 0:
        raise UserError(
            f"{path} has wrong metadata ({output.names_key}: {len(names)}, not one for each threshold); make it again"
        )


class Predictor:
    """Predict batches of images. `names` (of the outputs) and `preprocessing` are the same as in training.

    run: a function of images and an output name (`probs`, `features` or `embedding`) that returns this output, float32
    [B, ...]. weights_hash: of the weights in training, or None. thresholds: [K], or None.
    """

    def __init__(self, metadata: Values, run: Callable[[Images, str], np.ndarray]) -> None:
        self.metadata = dict(metadata)
        self._run = run
        self.output = OUTPUTS[metadata["output"]]
        self.names = [] if self.output.names_key is None else list(metadata[self.output.names_key])
        self.categories = np.array(metadata.get("tag_categories") or [GENERAL] * len(self.names))
        counts = np.array(metadata.get("tag_counts") or [1] * len(self.names))
        self.has_ratings = bool(counts[self.categories == RATING].any())
        self.thresholds = metadata.get("thresholds")
        self.weights_hash = metadata.get("weights_hash")
        self.preprocessing = dict(metadata["preprocessing"])

    def predict(self, images: Images) -> np.ndarray:
        """Return probabilities float32 [B, K], or features [B, C]."""
        return self._run(images, self.output.heads[-1])

    def embed(self, images: Images) -> np.ndarray:
        """Return embeddings, float32 [B, D]. Raises UserError (`weights`) without any."""
        return self._run(images, "embedding")

    def choose_thresholds(
        self, weights: Path, profile: str = PER_TAG, threshold: float | None = None, file: str | None = None
    ) -> np.ndarray:
        """Return the threshold of each output [K], or one for all outputs.

        The first of these counts: `threshold`; by `profile` (of tags), the table in `file` or beside the weights; the
        thresholds of the metadata; the default, for classes 0. Raises UserError (`thresholds`, `profile`).
        """
        if threshold is not None:
            return np.float32(threshold)
        if (table := find_thresholds(file, weights, self.weights_hash)) is not None:
            vocabulary = Vocabulary.of(zip(self.categories.tolist(), self.names))
            return np.array(table.of_tags(vocabulary, profile), dtype=np.float32)
        if not self.output.has_tags:
            return np.array(self.thresholds or 0.0, dtype=np.float32)
        if profile != PER_TAG:
            raise UserError(
                f"profile: {profile} needs calibrated thresholds, and {weights} has none; fit them to its run or "
                "weight file with evaluate.py calibrate=true, or give thresholds=FILE"
            )
        least = self.thresholds or DEFAULT_THRESHOLD
        log.info("thresholds: %s", f"from {weights}" if self.thresholds else f"{least}, not calibrated")
        return np.array(least, dtype=np.float32)

    def options(self, top: int, thresholds: np.ndarray, **further: Any) -> RowOptions:
        """Return the user's options for `rows`, with the columns of this predictor."""
        return RowOptions(self.names, self.categories, self.has_ratings, top, thresholds, **further)

    def rows(self, images: Images, options: RowOptions) -> list[Json]:
        """Return an output row for each image."""
        return [self.output.make_row(values, options) for values in self.predict(images)]


def onnx_predictor(path: Path, device: "torch.device | str") -> Predictor:
    """Return the predictor of an ONNX file, run by ONNX Runtime. Raises UserError if the file cannot be read."""
    session = open_session(path, device)
    metadata = _read_metadata(path, session)
    output = OUTPUTS[metadata["output"]]
    heads = output.heads
    form = OnnxForm.model_validate(metadata.get("form") or {"outputs": {name: name for name in heads}})
    names = {what: name for name, what in form.outputs.items()}
    names.setdefault("embedding", names.get("features"))
    is_logits = heads[-1] == "probs" and "probs" not in names
    names.setdefault("probs", names.get("logits"))
    preprocessing = metadata["preprocessing"]
    mean, std = (np.float32(preprocessing[name])[:, None, None] for name in ("mean", "std"))
    first, *others = session.get_inputs()
    # Of 448 px, or of smaller images side by side: larger maps leave a core's cache (docs/benchmarks.md#taggers).
    size = max(448 // preprocessing["image_size_hw"][0], 1) if device == "cpu" else None
    if first.shape[0] == 1:
        size = 1  # older WD files
    outputs = {value.name: value.shape for value in session.get_outputs()}
    shape = outputs.get(names.get(heads[-1]), [])
    width = len(metadata.get(output.names_key, ()))
    if others or first.name != form.input or len(shape) != 2 or (width and shape[1] != width):
        raise UserError(
            f"{path} takes {first.name} and gives the outputs {outputs}; its metadata name {form.input}, and "
            f"{names.get(heads[-1])} of [batch, {width or 'C'}]"
        )

    def run(images: Images, what: str) -> np.ndarray:
        if names.get(what) not in outputs:
            raise UserError(
                f"weights: {path} has no {what} among its outputs, {', '.join(outputs)}; name the run, or export it "
                "with format=wd14"
            )
        levels = images if isinstance(images, np.ndarray) else images.cpu().numpy()
        batch = levels.astype(np.float32) / 255.0
        batch = form.to_input((batch - mean) / std if form.is_normalised else batch)
        values = map_parts(lambda part: session.run([names[what]], {form.input: part})[0], batch, size or len(batch))
        return np.tanh(values / 2) / 2 + 0.5 if is_logits and what == "probs" else values

    return Predictor(metadata, run)


def open_session(path: Path, device: "torch.device | str") -> Any:
    """Open a file in ONNX Runtime. If its CUDA libraries are missing, warn and use the CPU."""
    import onnxruntime

    refuse_external_data(path)
    # ONNX Runtime lists the providers that it was built with, even if they do not work here, so ask torch.
    providers = ["CUDAExecutionProvider"] if str(device).startswith("cuda") else []
    if providers:
        onnxruntime.preload_dlls()  # CUDA's libraries, from their packages
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # each core computes images of its own
    with readable(path, "ONNX"):
        session = onnxruntime.InferenceSession(path, options, providers=[*providers, "CPUExecutionProvider"])
    if not set(providers) <= set(session.get_providers()):
        log.warning(
            "ONNX Runtime cannot load its CUDA libraries, so %s runs on the CPU; "
            "pip install 'onnxruntime-gpu[cuda,cudnn]' installs them", path,
        )  # fmt: skip
    return session


def refuse_external_data(path: Path) -> None:
    """Raise UserError if an ONNX file refers to other files.

    ONNX Runtime reads referenced files below the ONNX file's folder, and older versions read any referenced file.
    """
    import onnx
    from google.protobuf.message import Message

    with readable(path, "ONNX"):
        stack = [onnx.load(path, load_external_data=False)]
    while stack:  # messages: the graph, graphs in attributes, functions
        message = stack.pop()
        if not isinstance(message, onnx.TensorProto):
            fields = [value for field, value in message.ListFields() if field.message_type is not None]
            stack += [part for value in fields for part in ([value] if isinstance(value, Message) else value)]
        elif message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            name = next((entry.value for entry in message.external_data if entry.key == "location"), "")
            raise UserError(f"{path} takes data from another file, {name[:200]!a}; export it as one (export.py does)")


def _read_metadata(path: Path, session: Any) -> Json:
    """Return the metadata of one of our files, or the equivalent for a tagger of others."""
    with readable(path, "ONNX"):  # the metadata may be no UTF-8
        text = session.get_modelmeta().custom_metadata_map.get("atelier")
        metadata = json.loads(text) if text else _describe_graph(path, session)
    check_metadata(path, metadata)
    if metadata.get("output") not in OUTPUTS:
        raise UserError(f"{path} has wrong metadata (output: {metadata.get('output')!r}); export it again")
    return metadata


def _describe_graph(path: Path, session: Any) -> Json:
    """Return the metadata of another program's tagger, as our files have them, by the files beside it and its graph."""
    metadata = describe(path, {"weights_hash": sha256_file(path)[:16]})
    if "form" not in metadata:
        raise UserError(f"{path} was not exported by Atelier; use export.py, or put a tagger's {FILE} beside it")
    taken = session.get_inputs()[0]
    names = {"*": session.get_outputs()[0].name}
    outputs = {names.get(name, name): what for name, what in metadata["form"]["outputs"].items()}
    form = OnnxForm.model_validate(
        metadata["form"] | {"input": taken.name, "channels": metadata["channels"], "outputs": outputs}
    )
    size_hw = taken.shape[1:3] if form.layout == "NHWC" else taken.shape[2:]
    images = {**metadata["preprocessing"], "image_size_hw": size_hw}
    return {**metadata, "preprocessing": images, "form": form.model_dump()}
