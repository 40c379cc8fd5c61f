"""Networks below the folders of view.py, asked about an image as predict.py does."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from data.tags.rules import TextConfig, read_rules
from data.tools import predictions
from utils.errors import UserError, about
from utils.formats.spelling import category_name, join_tags
from utils.formats.thresholds import thresholds_path
from utils.formats.vocabulary import FILE
from utils.io.files import readable, sha256_text
from utils.io.safe_text import escape_controls
from utils.record.run_index import is_inside

if TYPE_CHECKING:  # torch is imported when the first network is asked
    from models.predictor import Predictor

_MAX_PIXELS = 100_000_000
_KEPT = 2  # networks in memory
_SHOWN = 30  # classes or tags


class Score(NamedTuple):
    """A class or a tag with its probability. least: its threshold, if it has one."""

    name: str
    prob: float
    is_chosen: bool
    least: float | None


class Answer(NamedTuple):
    """What a network says of an image: bars by category, a caption, the image as it sees it, and a line of facts."""

    bars: dict[str, list[Score]]
    caption: str
    seen: Image.Image
    facts: str


class Networks:
    """Networks below `roots`. load: reads a predictor; text: how tags become a caption."""

    def __init__(self, roots: Sequence[str], load: Callable[[Path], "Predictor"], text: TextConfig) -> None:
        self.roots = [Path(root).resolve() for root in roots]
        self._text = text
        self._load = lru_cache(_KEPT)(lambda path, changed: load(path))
        self._lock = RLock()

    def find(self, name: str) -> Path:
        """Return the weight file that is named by its path, its run, or its folder with a WD tagger.

        Raises UserError (`weights`) unless it and the files beside it are below the roots, also where links lead.
        """
        from utils.io.weight_files import find_weights

        with about("weights"), readable(Path(name), "weight"):
            path = Path(name).resolve()
            if self._is_below(path):
                path = find_weights(str(path), "best", onnx_first=True)
            beside = path, thresholds_path(path), path.with_name(FILE)
            if path.suffix not in (".safetensors", ".onnx") or not all(map(self._is_below, beside)):
                roots = ", ".join(map(str, self.roots))
                raise UserError(f"{path} is no .safetensors or .onnx file below {roots}; view.py runs=FOLDER adds more")
        return path

    def _is_below(self, path: Path) -> bool:
        return any(is_inside(path, root) for root in self.roots)

    def get(self, path: Path) -> tuple["Predictor", str]:
        """Return the predictor of a weight file as it is now, and its version. Raises UserError (`weights`)."""
        with about("weights"), self._lock:
            changed = path.stat().st_mtime_ns
            return self._load(path, changed), sha256_text(f"{path} {changed}")

    def ask(self, weights: str, profile: str, content: bytes, file: str) -> Answer:
        """Return the answer about an encoded image, from a file of this name.

        Raises UnreadableImage, UserError (`weights`, `thresholds`, `profile`).
        """
        path = self.find(weights)
        predictor, _ = self.get(path)
        output = predictor.output
        with self._lock:  # one image is decoded at a time
            images = prepare_image(predictor, content, file)
            values = predictor.predict(images)[0]
        least = np.broadcast_to(predictor.choose_thresholds(path, profile), len(values))
        text = self._text
        if output.has_tags and text.exclude:
            excluded = predictions.find_excluded(predictor.names, predictor.categories, text.exclude)
            least = np.where(excluded, np.inf, least)
        row = output.make_row(values, predictor.options(1, least, max_tags=text.max_tags, order=text.order))
        caption = "unsure" if row.get("unsure") else row.get("class", str(row.get("number", "")))
        if output.has_tags:
            caption = join_tags(predictions.spell_tags(row, text, read_rules(text, "text.")), text.separator)
        chosen = {
            "classes": [] if row.get("unsure") else [row.get("class")],
            "rating": [row.get("rating")],
            **row.get("probs", {}),
        }
        bars = dict[str, list[Score]]()
        for place, index in enumerate(np.argsort(-values).tolist() if predictor.names else ()):
            kind = category_name(int(predictor.categories[index])) if output.has_tags else "classes"
            name = predictor.names[index]
            is_chosen = name in chosen.get(kind, ())
            is_rating = kind == "rating"
            if (place < _SHOWN or is_chosen) and (predictor.has_ratings or not is_rating):
                limit = float(least[index]) if least.any() and not is_rating else None
                bars.setdefault(kind, []).append(Score(escape_controls(name), float(values[index]), is_chosen, limit))
        facts = f"{file}, as the network sees it: {images.shape[3]} x {images.shape[2]} pixels"
        return Answer(bars, escape_controls(caption), Image.fromarray(images[0].transpose(1, 2, 0).squeeze()), facts)


def prepare_image(predictor: "Predictor", content: bytes, name: str) -> Any:
    """Return an encoded image as a network takes it, [1, C, H, W]. Raises UnreadableImage."""
    from data.images.prepare import preparer

    return preparer(predictor.preprocessing, _MAX_PIXELS)(content, name)[None]
