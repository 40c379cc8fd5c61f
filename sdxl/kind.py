"""SDXL as a kind of training: captioned images in buckets, read from files or from caches of latents and texts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Generator, Tensor

from data.collection.choose import training_rows
from data.collection.collection import Collection, describe_concepts
from data.config import DataConfig
from data.images.record_store import TensorStore, record_key
from data.images.sizes import SIZES, image_hashes, image_sizes
from data.load import describe_collection
from data.open import Data
from data.stream.batch import Sample
from data.stream.loader import Example, Fields
from data.stream.order import Views, build_sampler
from data.stream.source import IMAGE, Source
from data.tags.captions import CaptionConfig, Captions, count_caption_tags, describe_captions
from data.tags.tag_weights import weigh_images
from engine.config import TrainingConfig
from engine.task import COMPARED, FILE_HASHES, IMAGE_HASHES, Loaders, Streams
from engine.tasks.kind import Kind, Setup
from engine.update.batch_size import naming_memory
from sdxl.caches.buckets import Buckets, fitted_views, make_buckets
from sdxl.caches.latent_cache import LatentCache
from sdxl.caches.masks import Masked, find_masks
from sdxl.caches.text_cache import TextCache, vary_caption
from sdxl.config import DiffusionTaskConfig, SDXLConfig
from sdxl.files.family import ENCODERS
from sdxl.files.tokenizer import LENGTH, count_chunks, tokenize
from sdxl.networks import base_files, frozen_dtype, load_vae, open_networks, settle_model
from sdxl.pictures.novelty import trained_stream
from sdxl.pictures.prompts import count_brackets
from sdxl.pictures.texts import text_field
from sdxl.settle import CHANGES
from sdxl.step import encode_captions, encode_images
from sdxl.task import DiffusionTask
from sdxl.vae import unlike_sdxls
from utils.contracts import State, Tensors
from utils.errors import UserError
from utils.io.files import Json
from utils.io.memo import hash_once
from utils.ranks import distributed
from utils.record.logging import log

_TEXTS_AT_ONCE = 16

Reading = tuple[Buckets, Data, Views, Fields]

Encode = Callable[[str], Tensors]  # from a caption to the network's inputs
VaryBy = Callable[[CaptionConfig, str, Generator], str]  # as CaptionConfig.arrange


class BucketedKind(Kind):
    """Images in the buckets of `task.buckets`."""

    def preprocessing(self, config: TrainingConfig) -> Json:
        """Return nothing: weight files do not describe images."""
        return {}

    def read(self, data: Data, setup: Setup, rows: ndarray, parts: int, *, training: bool) -> Reading:
        """Return the buckets, data, views and fields of some rows. parts: samples of a step, over all ranks."""
        raise NotImplementedError

    def training(self, data: Data, setup: Setup, config: TrainingConfig) -> Streams:
        """Return the training stream, in buckets."""
        collection = data.collection
        rows = training_rows(collection, config.loop)
        buckets, read, views, fields = self.read(data, setup, rows, config.loop.batch_size, training=True)
        if len(buckets.rows) == 0:
            raise UserError(f"task.buckets: {buckets.describe()}; set other limits")
        sampler = build_sampler("shuffled", buckets.rows, collection, config.seed, buckets.groups, setup.task.chunk)
        train = read.train(buckets.rows, fields, views, sampler=sampler)
        described = {"collection": describe_collection(collection), "images": buckets.describe()}
        trained_on = {"buckets": buckets.count()}
        tables = {"buckets": partial(buckets.list_images, collection)}
        return Streams(train, {}, read.fingerprints, described=described, trained_on=trained_on, tables=tables)

    def evaluation(self, data: Data, setup: Setup, rows: ndarray, *, training: bool) -> Loaders:
        """Return `val`, in buckets, with centred crops and whole captions."""
        still = setup.task.changed({"buckets.flip": 0.0, "buckets.crop": "centre"})
        buckets, read, views, fields = self.read(data, replace(setup, task=still), rows, 1, training=False)
        return {"val": read.evaluation(buckets.rows, fields, views, groups=buckets.groups)}


def find_buckets(data: Data, setup: Setup, rows: ndarray) -> Buckets:
    """Return the buckets of some rows."""
    return make_buckets(data.collection, rows, image_sizes(data.collection, rows, SIZES), setup.task.buckets)


class DiffusionKind(BucketedKind):
    """SDXL: a LoRA, or the whole network."""

    model = SDXLConfig
    task = DiffusionTask
    changes = CHANGES
    next_commands = ("python predict.py weights={run} prompts=FILE output=FOLDER",)

    def commands(self, setup: Setup, streams: Streams, collection: Collection) -> list[str]:
        """Return the export that programs read, and the evaluation."""
        form = "single_file" if setup.task.lora is None else "kohya"
        return [f"python export.py format={form} run_dir={{run}}", *super().commands(setup, streams, collection)]

    def find_facts(self, config: TrainingConfig, collection: Collection) -> Json:
        """Check another VAE. There are no facts."""
        model = config.model
        if model.vae is not None:
            with torch.device("meta"):
                load_vae(model.vae)
            if named := unlike_sdxls(model.vae_values):
                log.warning("model.vae: %s has %s, unlike SDXL's: the U-Net learns other latents", model.vae, named)
        return {}

    def source(self, collection: Collection, config: DataConfig, setup: Setup, *, repeats: bool) -> Source:
        """Return the images. With a latent cache they are read once, so they are not kept in memory."""
        return super().source(collection, config, setup, repeats=repeats and setup.task.latent_cache is None)

    def streams(self, data: Data, setup: Setup, config: TrainingConfig) -> Streams:
        """Return the data of a run. This fills the caches first, except in a dry run."""
        collection = data.collection
        captions = setup.task.captions
        sources = describe_captions(collection, training_rows(collection, config.loop), captions)
        streams = super().streams(data, setup, config)
        images = np.unique(streams.train.sampler.rows)
        frequency = distributed.rank_zero_call(
            lambda: count_caption_tags(collection, images, Captions(captions, collection))
        )
        described = {**streams.described, "collection": f"{streams.described['collection']}; {sources}"}
        if collection.concepts:
            described["concepts"] = describe_concepts(collection, streams.train.sampler.rows)
        trained_on = {**streams.trained_on, "images": len(images), "tag_frequency": frequency}
        triggers = [captions.prefix, *(concept.trigger for concept in collection.concepts if not concept.is_prior)]
        if trigger := ", ".join(dict.fromkeys(filter(None, triggers))):
            trained_on["trigger"] = trigger
        ends = {COMPARED: math.inf}  # pictures are compared at the end of a run
        return replace(streams, described=described, trained_on=trained_on, every_epochs=ends)

    def read(self, data: Data, setup: Setup, rows: ndarray, parts: int, *, training: bool) -> Reading:
        """Return the data of some rows, from files or from caches, which are filled first."""
        task = setup.task
        collection = data.collection
        buckets = find_buckets(data, setup, rows)
        encode, vary = _read_texts(data, setup, rows, training=training)
        rules = Captions(task.captions, collection)
        concepts = collection.concepts
        concept_of = collection.concept_ids()
        weights = np.ones(len(collection))  # of each row's loss
        if concepts:
            weights *= np.array([concept.weight for concept in concepts])[concept_of]
        if task.tag_weights is not None:
            weights *= weigh_images(collection, rows, task.tag_weights, rules)
        read = data
        find_fit = buckets.draw_fit
        if task.latent_cache is not None:
            latents = _read_latents(data, setup, buckets)
            find_fit = latents.find_fit
            if not data.dry_run:
                read = data.read_from(latents, latents.fingerprints)
        views = fitted_views(find_fit) if read is data else {}
        if task.mask is not None:
            masks = find_masks(collection, buckets.rows, buckets.image_hw, task.mask.source, training=training)
            digest = record_key([[row, sha256] for row, (_, sha256, _) in masks.items()])
            read = read.read_from(Masked(read.source, masks, buckets, find_fit), {"task.mask": digest})

        def add(example: Example) -> Sample:
            """Return a sample's record, caption, position in the step and concept, and in training its weight."""
            row = example.draw.index
            own = rules.of(row)
            generator = example.generator if example.training else None
            text, is_dropped = own.draw(own.read(example.row), generator, partial(vary, own))
            fields = {name: part for name, part in example.record.items() if name != IMAGE}
            fields |= {**encode(text), "is_dropped": is_dropped}
            fields["strata"] = torch.tensor([example.draw.position % parts, parts])
            if example.training:
                fields["loss_weight"] = float(weights[row])
            if any(concept.is_prior for concept in concepts):
                fields["is_prior"] = concepts[concept_of[row]].is_prior
            return fields

        return buckets, read, views, add

    def evaluation(self, data: Data, setup: Setup, rows: ndarray, *, training: bool) -> Loaders:
        """Return `val`; if the task draws pictures, also the training images to compare them with."""
        loaders = super().evaluation(data, setup, rows, training=training)
        if setup.task.samples.prompts:
            loaders[COMPARED] = trained_stream(data)
        return loaders


# ----------------------------------------------------------------------------------------------------------- captions


def _read_texts(data: Data, setup: Setup, rows: ndarray, *, training: bool) -> tuple[Encode, VaryBy]:
    """Return a function from a caption to its tokens or its record in the text cache, and a function that varies texts.

    Captions are padded to the chunks of the longest one. This warns of captions that are cut, and fills the text cache.
    """
    task = setup.task
    captions = task.captions
    rules = Captions(captions, data.collection)
    pairs = []
    for row in rows.tolist():
        own = rules.of(row)
        texts = own.read(data.collection.row(row))
        pairs += [(text, own) for text in (texts if training else texts[:1])]
    chunks = _count_chunks(pairs, task, "training" if training else "validation")
    vary = CaptionConfig.arrange
    if task.text_cache is not None:
        vary = partial(_draw_variant, most=task.text_variants)
    if data.dry_run:
        return text_field, vary
    if task.text_cache is None:
        return partial(_encode_tokens, chunks=chunks, emphasis=captions.emphasis), vary
    to_encode = [""]
    for text, own in pairs:
        if training:
            variants = range(task.text_variants if own.varies_tags else 1)
            to_encode += [vary_caption(text, number, own.arrange) for number in variants]
        else:
            to_encode.append(own.arrange(text))
    return _cache_texts(data, setup, to_encode, chunks).read, vary


def _cache_texts(data: Data, setup: Setup, texts: Sequence[str], chunks: int) -> TextCache:
    """Return the text cache, which has `texts`."""
    task = setup.task
    emphasis = task.captions.emphasis

    @cache  # loaded only if a text is missing
    def encoders() -> list[torch.nn.Module]:
        opened = open_networks(setup.model, ENCODERS, frozen=True)
        return [network.to(data.machine.device) for network in opened.values()]

    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        return encode_captions(encoders(), texts, chunks, emphasis=emphasis)

    inputs = {"encoders": _fingerprint(setup.model, ENCODERS), "most_chunks": task.caption_chunks, "emphasis": emphasis}
    texts_cache = TextCache(TensorStore(Path(task.text_cache), "task.text_cache"), inputs, chunks * LENGTH)
    texts_cache.fill(texts, encode, _TEXTS_AT_ONCE)
    return texts_cache


def _encode_tokens(caption: str, *, chunks: int, emphasis: bool) -> State:
    tokens = zip(("token_ids", "token_weights"), tokenize([caption], chunks, emphasis=emphasis))
    return {name: tensor[0] for name, tensor in tokens if tensor is not None}


def _draw_variant(own: CaptionConfig, text: str, generator: Generator, *, most: int) -> str:
    """Return one of the texts of a caption in the text cache."""
    number = int(torch.randint(most if own.varies_tags else 1, (), generator=generator))
    return vary_caption(text, number, own.arrange)


def _count_chunks(pairs: Sequence[tuple[str, CaptionConfig]], task: DiffusionTaskConfig, split: str) -> int:
    """Return the chunks of the longest caption, at most `task.caption_chunks`; log emphasis, and what is cut."""
    captions = task.captions
    count_brackets([text for text, _ in pairs], captions.emphasis, f"{split} captions (task.captions.emphasis)")
    needed = [count_chunks(own.arrange(text), emphasis=captions.emphasis) for text, own in pairs] or [1]
    chunks = min(max(needed), task.caption_chunks)
    if max(needed) > chunks:
        log.warning(
            "task.caption_chunks: %d of %d %s captions are longer than %d x 75 tokens and are cut; %d would hold all",
            sum(number > chunks for number in needed), len(pairs), split, chunks, max(needed),
        )  # fmt: skip
    return chunks


def _read_latents(data: Data, setup: Setup, buckets: Buckets) -> LatentCache:
    """Return the cache of the latents of images in their buckets; it is complete, except in a dry run."""
    task = setup.task
    padding = settle_model(setup.model).vae_values["padding_mode"]
    inputs = (_fingerprint(setup.model, ("vae",)), data.source.decoder.background, padding)
    store = TensorStore(Path(task.latent_cache), "task.latent_cache")
    hashes = image_hashes(data.collection, buckets.rows, IMAGE_HASHES)
    latents = LatentCache(store, data.collection, buckets, inputs, hashes)
    if not data.dry_run and store.is_missing(latents.keys).any():
        with naming_memory("task.buckets.areas_px"):
            vae = open_networks(setup.model, ["vae"], frozen=True)["vae"].to(data.machine.device)
            latents.fill(partial(encode_images, vae), data.source, data.machine, data.batch_size, data.unreadable)
    return latents


def _fingerprint(model: SDXLConfig, parts: tuple[str, ...]) -> str:
    """Return a hash of the files of some networks, or of the single file that has all networks."""
    hashes = distributed.rank_zero_call(lambda: [hash_once(file, FILE_HASHES) for file in base_files(model, parts)])
    dtype = str(frozen_dtype(model, parts[0])).removeprefix("torch.")
    return record_key(model.name if model.path is None else "", hashes, dtype)
