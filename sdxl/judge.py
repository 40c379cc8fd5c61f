"""A judge for SDXL: a tagger looks at pictures that are drawn for held-out captions (`task.judge`).

    stream = judged_stream(Judge(config), config, data, captions, rows)     # held-out pictures with captions and tags
    trained = judge.see_trained(trained_stream(judge, data), device)
    report = judge.report(gather(stream), drawn, trained, device)

The figures are exact on any number of ranks: pictures are drawn on all of them, and looked at one by one on rank 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.augment.transforms import EvalTransform
from data.collection.choose import spread
from data.images.convert import convert
from data.open import Data
from data.stream.batch import Ragged, Sample
from data.stream.loader import EvaluationStream, Example
from data.stream.order import Views
from data.tags.captions import CaptionConfig, Captions
from data.tags.tag_weights import read_tags
from engine.measures.neighbours import find_nearest
from engine.task import Report, visiting
from engine.tasks.opening import load_task, read_setup
from models.image_model import ImageModel
from models.predictor import known_outputs, onnx_predictor, torch_predictor
from sdxl.config import JudgeConfig
from sdxl.judging import Seen, judge_pictures, tag_rows
from utils.contracts import Batch
from utils.errors import UserError, about
from utils.formats.spelling import parse_tag
from utils.formats.thresholds import thresholds_path
from utils.formats.vocabulary import FILE, RATING
from utils.io.files import Values
from utils.io.weights import find_weights
from utils.ranks import distributed
from utils.record.figures import INK
from utils.record.logging import get_logger
from utils.record.pictures import RIGHT, WRONG, Line, image_grid, legible, shorten

log = get_logger(__name__)

_SHOWN = 5  # unknown tags in a message
_WIDTH = 26  # characters of a line below a picture
_MOST_TRAINED = 2_000  # training images that drawn pictures are compared with
_LEAST_DISTANCE = 1e-6  # of real pictures: they may all be in training, too
_LINES = 3  # lines of missing or leaked tags
_COPIES = 0.7  # a novelty below it (docs/results.md, does a fine-tune copy)


class Held(NamedTuple):
    """A held-out picture as the tagger takes it, its caption, and tags bool [T]: prompted, and other trained ones."""

    row: int
    caption: str
    prompted: np.ndarray
    others: np.ndarray
    image: Tensor


def prepare(picture: np.ndarray, preprocessing: Values) -> Tensor:
    """Return a picture, uint8 [H, W, 3], as a tagger takes it, uint8 [C, h, w]."""
    pixels = torch.from_numpy(convert(Image.fromarray(picture), preprocessing["channels"], None))
    return EvalTransform(preprocessing)(pixels.permute(2, 0, 1))


class Judge(nn.Module):
    """A tagger with its thresholds. It is no network of the task, and on the device only while it looks.

    outputs: the output of each tag that it knows. Raises UserError (`task.judge.weights`).
    """

    @about("task.judge.weights")
    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.path = find_weights(config.weights, "best", onnx_first=True)
        self._model: list[ImageModel] = []  # a list hides the module
        if self.path.suffix == ".onnx":
            self._predictor = onnx_predictor(self.path, torch.device("cpu"))
        else:
            kind, setup, metadata = read_setup(self.path, ("tagging",))
            task = load_task(self.path, kind, setup, "export")
            self._model.append(ImageModel(task.network, setup.normalise(), kind.output).eval())
            self._predictor = torch_predictor(self._model[0], {**metadata, "output": kind.output}, torch.device("cpu"))
        self.names = self._predictor.names
        self.preprocessing = self._predictor.preprocessing
        self.outputs = {
            name: output
            for (category, name), output in known_outputs(str(self.path), self._predictor).items()
            if category != RATING
        }
        self._thresholds = self._predictor.choose_thresholds(self.path)
        self._trained: dict[str, Tensor] = {}  # the vectors of this rank's training images, by path

    def files(self) -> list[Path]:
        """Return the files that decide the figures."""
        files = (self.path, thresholds_path(self.path), self.path.with_name(FILE))
        return [file for file in files if file.is_file()]

    def look(self, images: Sequence[Tensor], device: torch.device) -> Seen:
        """Return what the tagger sees, image by image: other batches would change the last digits."""
        with visiting(device, *self._model), torch.autocast(device.type, enabled=False):
            predictor = self._predictor
            for model in self._model:
                predictor = torch_predictor(model, predictor.metadata, device)
            embed = predictor.embed if predictor.embeds else predictor.predict
            probs = [predictor.predict(image[None]) for image in images]
            vectors = [embed(image[None]) for image in images]
        return Seen(np.concatenate(probs) >= self._thresholds, np.concatenate(vectors))

    def see_trained(self, stream: Iterable[Batch], device: torch.device) -> dict[str, Tensor]:
        """Return the vectors [D] of the training images of all ranks, by path. Each is looked at once."""
        for batch in stream:
            for path, image, weight in zip(read_texts(batch), batch["images"].cpu(), batch["weight"].tolist()):
                if weight > 0 and path not in self._trained:
                    self._trained[path] = torch.from_numpy(self.look([image], device).vectors[0])
        return dict(chain.from_iterable(part.items() for part in distributed.gather_objects(self._trained)))

    def report(
        self, held: Sequence[Held], drawn: Sequence[np.ndarray], trained: Mapping[str, Tensor], device: torch.device
    ) -> Report:
        """Judge the pictures of the captions of `held`. Scalars `judge.*`: those of `judge_pictures`, and `novelty`.

        novelty: the mean distance of the drawn pictures to their nearest training images, divided by that of the
        real ones: 0 for copies, about 1 for pictures as new as the real ones. trained: of `see_trained`.
        """
        prompted = np.stack([each.prompted for each in held])
        others = np.stack([each.others for each in held])
        real = self.look([each.image for each in held], device)
        seen = self.look([prepare(picture, self.preprocessing) for picture in drawn], device)
        figures = judge_pictures(prompted, others, seen, real)
        vectors = torch.stack([*trained.values()])
        (near, rows), (real_near, _) = (
            find_nearest(torch.from_numpy(each.vectors), vectors, 1) for each in (seen, real)
        )
        figures["novelty"] = float((1 - near).mean() / (1 - real_near).mean().clamp(min=_LEAST_DISTANCE))
        if figures["novelty"] < _COPIES:
            log.warning("judge.novelty: %.2g: probably copies; see tables/judge_nearest.csv", figures["novelty"])
        title = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        title += "\n- prompted and not seen, in blue; + seen and not prompted, in red"
        captions = [self._describe(each, tags) for each, tags in zip(held, seen.tags)]
        grid = image_grid(drawn, captions, title, columns=4, tile_px=226)
        scalars = {f"judge.{name}": value for name, value in figures.items()}
        names = [*trained]
        tables = {"judge": tag_rows(self.names, prompted, others, seen, real)}
        tables["judge_nearest"] = [
            {
                "caption": each.caption,
                "similarity": round(near[number].item(), 4),
                "training_image": names[rows[number]],
            }
            for number, each in enumerate(held)
        ]
        return Report(scalars, tables, {"judge": grid})

    def _describe(self, held: Held, seen: np.ndarray) -> list[Line]:
        """Return the lines below a drawn picture: its caption, what is missing, and what is seen unprompted."""
        lines = [(held.caption, INK)]
        for sign, tags, color in (("-", held.prompted & ~seen, RIGHT), ("+", held.others & seen, WRONG)):
            lines += [(f"{sign} {self.names[tag]}", color) for tag in np.flatnonzero(tags)[:_LINES]]
        return [(legible(shorten(text, _WIDTH)), color) for text, color in lines]


def judged_stream(
    judge: Judge, config: JudgeConfig, data: Data, captions: CaptionConfig, rows: np.ndarray
) -> EvaluationStream:
    """Return `config.prompts` of `rows`, evenly spread, whose captions have a tag that the judge knows.

    Fields beside `images`: `caption`, in UTF-8, and bool [T] of the judge's outputs: `prompted`, the tags in the
    caption, and `others`, the other tags of the training split. Raises UserError (`task.judge.weights`) if the judge
    knows no tag.
    """
    collection = data.collection
    rules = Captions(captions, collection)
    tags = read_tags(collection, rules)
    width = len(judge.names)
    outputs = np.array([judge.outputs.get(parse_tag(name).name, width) for name in tags.names], dtype=np.int64)

    def mark(ids: np.ndarray) -> np.ndarray:
        """Return which outputs are those of some tags; unknown ones go to a place behind them."""
        marked = np.zeros(width + 1, dtype=bool)
        marked[outputs[ids]] = True
        return marked[:width]

    texts = {}
    prompted = {}
    wanted = set()  # tags
    for row in rows.tolist():
        own = rules.of(row)
        texts[row] = own.complete(own.read(collection.row(row))[0])
        shown = tags.of_row(row)[np.array(tags.find_shown(row, texts[row], own), bool)]
        wanted.update(shown.tolist())
        prompted[row] = mark(shown)
    unknown = [tags.names[tag] for tag in sorted(wanted) if outputs[tag] == width]
    usable = [row for row, marked in prompted.items() if marked.any()]
    named = f"{len(unknown):,} of the {len(wanted):,} tags of the validation captions, such as {unknown[:_SHOWN]}"
    if not usable:
        raise UserError(
            f"task.judge.weights: {judge.path} does not know {named}; it knows {width:,} tags, such as "
            f"{judge.names[:_SHOWN]}. Name a tagger of these tags; without validation images whose captions have tags, "
            "set task.judge=null"
        )
    places = np.linspace(0, len(usable) - 1, min(config.prompts, len(usable)))
    chosen = np.array(usable)[places.round().astype(int)]
    asked = sum(int(prompted[row].sum()) for row in chosen.tolist())
    said = "judge: %s, %d prompts with %d tags: recalls that differ by less than %.1g are equal"
    log.info(said, judge.path, len(chosen), asked, asked**-0.5)
    if unknown:
        log.warning("task.judge.weights: %s does not know %s; they are not judged", judge.path, named)
    trained = mark(np.flatnonzero(tags.count(collection.rows("train"), len(outputs))))

    def add(example: Example) -> Sample:
        row = example.draw.index
        marked = torch.from_numpy(prompted[row])
        return {**text_field(texts[row]), "prompted": marked, "others": torch.from_numpy(trained) & ~marked}

    return data.evaluation(chosen, add, _views(judge))


def trained_stream(judge: Judge, data: Data) -> EvaluationStream:
    """Return the training images, evenly spread if there are many, as the judge takes them; `caption` is the path."""
    rows = spread(data.collection.rows("train"), _MOST_TRAINED)
    return data.evaluation(rows, lambda example: text_field(example.row.path), _views(judge))


def _views(judge: Judge) -> Views:
    return {"images": lambda image, draw: prepare(image.permute(1, 2, 0).numpy(), judge.preprocessing)}


def text_field(caption: str) -> dict[str, Ragged]:
    """Return the `caption` of a sample, for `read_texts`."""
    return {"caption": Ragged(torch.tensor([*caption.encode()], dtype=torch.uint8))}


def read_texts(batch: Batch) -> list[str]:
    """Return the `caption` of each sample of a batch."""
    letters = bytes(batch["caption"].tolist())
    ends = batch["caption_offsets"].tolist()
    return [letters[start:end].decode(errors="replace") for start, end in zip(ends, ends[1:])]


def gather(stream: Iterable[Batch]) -> list[Held]:
    """Return the readable pictures of all ranks, in the collection's order."""
    held = []
    for batch in stream:
        tags = (batch[name].cpu().numpy() for name in ("prompted", "others"))
        parts = zip(batch["sample_id"].tolist(), read_texts(batch), *tags, batch["images"].cpu())
        held += [Held(*part) for part, weight in zip(parts, batch["weight"].tolist()) if weight > 0]
    held = sorted(chain.from_iterable(distributed.gather_objects(held)), key=lambda each: each.row)
    if not held:
        raise UserError("data.root: the judge can read no validation image; see the warnings above")
    return held
