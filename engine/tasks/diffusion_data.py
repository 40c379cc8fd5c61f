"""How captioned images reach task=diffusion: in buckets of shapes, with captions, from files or from caches."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batch import Ragged
from data.buckets import SIZES, Buckets, FittedView, image_sizes, make_buckets
from data.cache.store import TensorStore, record_key
from data.captions import describe_captions
from data.collection import Collection
from data.config import DataConfig
from data.images import Images
from data.latent_cache import LatentCache, LatentRecipe, image_hashes
from data.loader import Example, Fields
from data.open import Data, describe_collection, load_collection, open_images
from data.rows import training_rows
from data.source import Source, layers
from data.stream import GroupedSampler
from data.tag_weights import ImageTags, describe_weights, read_tags, weigh_images
from data.text_cache import TextCache, vary_caption
from data.transforms import Transform
from engine.config import TrainingConfig
from engine.runtime import Runtime
from engine.streams import Streams
from engine.task import FILE_HASHES
from engine.tasks.diffusion_config import DiffusionTaskConfig
from engine.tasks.kind import Pipeline, Setup
from models.sdxl.names import ENCODERS
from models.sdxl.networks import SDXLConfig, base_files, describe, open_networks
from models.sdxl.step import encode_images, encode_text
from models.sdxl.tokenizer import tokenize
from utils.canvas import DEFAULT
from utils.contracts import Batch
from utils.errors import UserError
from utils.io.memo import hash_once
from utils.ranks import distributed

HASHES = Path("outputs/cache/image_hashes.jsonl")
_TEXTS_AT_ONCE = 16

TextTensors = Callable[[str], Mapping[str, Tensor]]  # what the network is given of a caption
Weights = np.ndarray | ImageTags


class CaptionFields:
    """Add a sample's caption, its weight, and its place in the step.

    tensors: of a caption. variants: that the cache has of one; None draws a new one each time. parts: samples of a
    step, over all ranks. weights: of the rows' tags, [rows of the collection], or the tags, which the task weighs.
    """

    def __init__(
        self, config: DiffusionTaskConfig, tensors: TextTensors, variants: int | None, parts: int, weights: Weights
    ) -> None:
        self.config, self.tensors, self.variants = config.captions, tensors, variants
        self.parts, self.weights = parts, weights

    def __call__(self, example: Example) -> dict[str, Tensor | Ragged]:
        """Return the fields."""
        text, is_dropped = self._caption(example)
        return {
            **self.tensors(text),
            "is_dropped": torch.tensor(is_dropped),
            "strata": torch.tensor([example.draw.position % self.parts, self.parts]),
            **self._weigh(example.draw.index, text),
        }

    def _weigh(self, row: int, text: str) -> dict[str, Tensor | Ragged]:
        if isinstance(self.weights, np.ndarray):
            return {"tag_weight": torch.tensor(self.weights[row], dtype=torch.float32)}
        shown = torch.tensor(self.weights.find_shown(row, text, self.config), dtype=torch.bool)
        return {"tags": Ragged(torch.tensor(self.weights.of_row(row)).long()), "tags_shown": Ragged(shown)}

    def _caption(self, example: Example) -> tuple[str, bool]:
        text, generator = self.config.read(example.row), example.generator
        if not example.training:
            return self.config.complete(text), False
        if self.variants is None:
            return self.config.vary(text, generator)
        if self.config.drops(generator):
            return "", True
        number = int(torch.randint(self.variants, (), generator=generator))
        return vary_caption(text, number, self.config.vary_tags), False


class Tokens:
    """The tokens of a caption, [chunks, 77]."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks

    def __call__(self, caption: str) -> dict[str, Tensor]:
        """Return them."""
        return {"token_ids": tokenize([caption], self.chunks)[0]}


class WithRecord:
    """Add the tensors of a record, then other fields."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields

    def __call__(self, example: Example) -> dict[str, Tensor | Ragged]:
        """Return the fields."""
        return {**example.record, **self.fields(example)}


class DiffusionPipeline(Pipeline[DiffusionTaskConfig]):
    """Captioned images of a collection, in buckets."""

    def complete(self, config: TrainingConfig) -> TrainingConfig:
        """Return the configuration as it is. Raises UserError where the base model predicts something else."""
        noise, path = config.task.noise, config.model.path
        if path is None or noise.convert:
            return config
        source = describe(path)
        stated = {key: source[key] for key in ("prediction_type", "zero_terminal_snr")}
        if wrong := [key for key, value in stated.items() if getattr(noise, key) != value]:
            ours, theirs = str(getattr(noise, wrong[0])).lower(), str(stated[wrong[0]]).lower()
            settings = " ".join(f"task.noise.{key}={str(value).lower()}" for key, value in stated.items())
            raise UserError(
                f"task.noise.{wrong[0]}: {ours}, but {path} says {theirs} of itself; set {settings}, or "
                "task.noise.convert=true to train it into another, which takes a long run"
            )
        return config

    def open(
        self, config: DataConfig, setup: Setup[DiffusionTaskConfig], runtime: Runtime, *, seed: int, batch_size: int
    ) -> Data:
        """Open a collection to measure a task on it."""
        collection = load_collection(config)
        source = _open_images(collection, config, repeats=False)
        return Data(collection, source, runtime, seed=seed, batch_size=batch_size, run_path=None)

    def open_training(self, config: TrainingConfig, runtime: Runtime, run_path: Path) -> Data:
        """Open the collection of a run."""
        collection, batch_size = load_collection(config.data), config.loop.first_batch_size
        source = _open_images(collection, config.data, repeats=config.task.latent_cache is None)
        return Data(collection, source, runtime, seed=config.seed, batch_size=batch_size, run_path=run_path)

    # ----------------------------------------------------------------------------------------------------- streams

    def streams(self, data: Data, setup: Setup[DiffusionTaskConfig], config: TrainingConfig) -> Streams:
        """Return the data of a run; caches are filled first, but not in a dry run, which reads no image."""
        task = setup.task
        if config.dry_run:
            setup = replace(setup, task=task.model_copy(update={"latent_cache": None, "text_cache": None}))
        rows = training_rows(data.collection, config.loop.train_paths)
        buckets = _bucket(data.collection, rows, setup.task)
        weights: Weights = np.ones(len(data.collection))
        described = {}
        if task.tag_weights is not None:
            tags = read_tags(data.collection, task.captions)
            weights = weigh_images(tags, rows, task.tag_weights)
            described["weights"] = describe_weights(weights[buckets.rows])
            weights = tags if task.reestimates else weights
        fields = _caption_fields(data, setup, rows, config.loop.global_batch_size, weights, training=True)
        read, views, fields = _read(data, setup, buckets, fields)
        sampler = GroupedSampler(buckets.rows, buckets.groups, task.chunk, config.seed)
        captions = describe_captions(data.collection, rows, task.captions)
        described = {
            "collection": f"{describe_collection(data.collection)}; {captions}",
            "images": buckets.describe(),
            **described,
        }
        return Streams(
            read.train(buckets.rows, fields, views, sampler=sampler),
            self.evaluation(data, setup, training=True),
            {**read.fingerprints, **setup.fingerprints()},
            described=described,
        )

    def evaluation(
        self, data: Data, setup: Setup[DiffusionTaskConfig], *, training: bool
    ) -> dict[str, Iterable[Batch]]:
        """Return `val`, in buckets, with centred crops and whole captions."""
        still = setup.task.buckets.model_copy(update={"flip": 0.0, "crop": "centre"})
        setup = replace(setup, task=setup.task.model_copy(update={"buckets": still}))
        rows = data.collection.rows("val")
        buckets = _bucket(data.collection, rows, setup.task)
        fields = _caption_fields(data, setup, rows, 1, np.ones(len(data.collection)), training=False)
        read, views, fields = _read(data, setup, buckets, fields)
        return {"val": read.evaluation(buckets.rows, fields, views, groups=buckets.groups)}


def _open_images(collection: Collection, config: DataConfig, *, repeats: bool) -> Source:
    """Return the source of images; those that are read once are not cached."""
    background = DEFAULT if config.background is None else config.background
    if not repeats:
        config = config.model_copy(update={"cache": config.cache.model_copy(update={"disk_gib": 0.0})})
    return open_images(collection, config, 3, background, repeats=repeats)


def _bucket(collection: Collection, rows: np.ndarray, task: DiffusionTaskConfig) -> Buckets:
    return make_buckets(collection, rows, image_sizes(collection, rows, SIZES), task.buckets)


def _read(
    data: Data, setup: Setup[DiffusionTaskConfig], buckets: Buckets, fields: Fields
) -> tuple[Data, dict[str, Transform], Fields]:
    """Return the data, views and fields: of the latent cache, which is filled first, or of the files."""
    task = setup.task
    if task.latent_cache is None:
        names = ("images", "fit")
        views = {name: FittedView(buckets.sizes_hw, task.buckets, conditions=name == "fit") for name in names}
        return data, views, fields
    images = next(layer for layer in layers(data.source) if isinstance(layer, Images))
    hashes = image_hashes(data.collection, buckets.rows, HASHES)
    recipe = LatentRecipe(_fingerprint(setup.model, ("vae",)), images.decoder.background, images.decoder.icc)
    store = TensorStore(Path(task.latent_cache), "task.latent_cache")
    cache = LatentCache(store, data.collection, buckets, task.buckets, recipe, hashes)
    if cache.is_missing().any():
        vae = open_networks(setup.model, ("vae",), frozen=True).vae.to(data.machine.device)
        cache.fill(lambda batch: encode_images(vae, batch), images, data.machine, data.batch_size, data.unreadable)
    return data.read_from(cache, cache.fingerprints), {}, WithRecord(fields)


def _caption_fields(
    data: Data,
    setup: Setup[DiffusionTaskConfig],
    rows: np.ndarray,
    parts: int,
    weights: Weights,
    *,
    training: bool,
) -> CaptionFields:
    """Return the fields of captions: of the text cache, which is filled first, or tokens."""
    task = setup.task
    if task.text_cache is None:
        return CaptionFields(task, Tokens(task.caption_chunks), None, parts, weights)
    variants = task.text_variants if training and task.captions.varies_tags else 1
    texts = [task.captions.read(data.collection.view(int(row))) for row in rows]
    wanted = [vary_caption(text, number, task.captions.vary_tags) for text in texts for number in range(variants)]
    if not training:
        wanted = [task.captions.complete(text) for text in texts]
    recipe = {"encoders": _fingerprint(setup.model, ENCODERS), "chunks": task.caption_chunks}
    cache = TextCache(TensorStore(Path(task.text_cache), "task.text_cache"), recipe)
    cache.fill(["", *wanted], _TextEncoders(setup.model, task.caption_chunks, data.machine.device), _TEXTS_AT_ONCE)
    return CaptionFields(task, cache.read, variants, parts, weights)


class _TextEncoders:
    """Encode captions; the encoders are loaded at the first call."""

    def __init__(self, model: SDXLConfig, chunks: int, device: torch.device) -> None:
        self.model, self.chunks, self.device, self.encoders = model, chunks, device, None

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        if self.encoders is None:
            networks = open_networks(self.model, ENCODERS, frozen=True)
            self.encoders = [getattr(networks, name).to(self.device) for name in ENCODERS]
        return encode_text(*self.encoders, tokenize(captions, self.chunks).to(self.device))


def _fingerprint(model: SDXLConfig, parts: tuple[str, ...]) -> str:
    """Return a hash of some networks: of their files, or of a single file as a whole."""
    files = base_files(model)
    chosen = [file for file in files if len(files) == 1 or file.parent.name in parts]
    hashes = distributed.rank_zero_call(lambda: [hash_once(file, FILE_HASHES) for file in chosen])
    return record_key(model.name if model.path is None else "", hashes, model.frozen_dtype)
