"""Diffusion: SDXL learns to remove noise from the latents of captioned images.

Noise, timesteps and sampled latents are drawn on the device from each sample's key. The fields of a batch:

    latent_mean, latent_logvar [B, 4, h, w] from the cache, or images [B, 3, H, W] without a cache
    fit [B, 6] int64: image size, top left corner of the crop, and crop size, which are SDXL's time_ids
    token_ids [B, chunks, 77], and token_weights with task.captions.emphasis; from the cache prompt_embeds [B, L, D] and
        pooled_prompt_embeds [B, P]
    is_dropped [B] bool: the caption was dropped; strata [B, 2]: the sample's position in the global batch, and its size
    loss_weight [B], in training, by concept and tags; is_prior [B] bool, if `data.concepts` has one
    mask [B, 1, h, w] float16, with task.mask: where the loss counts

Source: Podell et al. 2023 (arXiv 2307.01952); sdxl/step.py has the other parts of a step, with the equations.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from engine.measures.means import measure_means
from engine.task import (
    COMPARED,
    FILE_HASHES,
    Loaders,
    Report,
    StepOutput,
    Task,
    Use,
    join_exported,
    log_mean,
    networks_of,
    split_exported,
    visiting,
)
from engine.tasks.kind import Setup
from engine.update.batch_size import naming_memory
from models.interop.metadata import dict_of
from models.weights.fit import is_meta, refuse_misfits
from sdxl.caches.masks import MASK
from sdxl.config import TIMESTEP_COUNT, Prompt
from sdxl.files.facts import state_facts
from sdxl.files.family import ENCODERS, PARTS, PREFIXES
from sdxl.files.names import from_single_file
from sdxl.files.tokenizer import LENGTH
from sdxl.lora.files import adapter_state
from sdxl.lora.lora import ADAPTED, LoRA, adapted_shapes, save_lora
from sdxl.networks import Networks, base_files, describe_base, open_networks, unused_layer
from sdxl.pictures.novelty import find_nearest_images
from sdxl.pictures.sampling import EncodedPrompt, encode_prompt, sample_pictures, scheduler_config
from sdxl.pictures.texts import texts_of
from sdxl.step import (
    CLASS_DRAW,
    LATENT_DRAW,
    NOISE_DRAW,
    OFFSET_DRAW,
    PERTURBATION_DRAW,
    NoiseLevel,
    add_coarse_noise,
    add_noise,
    build_noise_table,
    draw_times,
    encode_images,
    encode_text,
    find_levels,
    loss_weight,
    measure_errors,
    target,
)
from sdxl.vae import latent_scale
from utils import rng
from utils.contracts import Batch, InitFrom, State
from utils.errors import UserError, about
from utils.io.files import Json, readable, write_atomically
from utils.io.hub import stated_license
from utils.io.memo import hash_once
from utils.io.weight_files import find_initial
from utils.io.weights import read_header, read_weights
from utils.ranks import distributed
from utils.record.logging import log
from utils.record.run_reader import run_of

_BINS = 5  # ranges of timesteps with a logged error each
_LEAST_AREA = 1e-6  # divisor for smaller masks, so that an empty mask trains nothing


class DiffusionTask(Task):
    """Own SDXL's networks, trained and frozen, and the LoRA if there is one."""

    best_needs = 8  # a tenth of a collection has them from 80 images on
    may_be_recorded = True

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        config = setup.task
        if "auto" in (config.noise.prediction_type, config.noise.zero_terminal_snr):
            raise UserError("task.noise: auto, which only a new run settles; set prediction_type and zero_terminal_snr")
        self._config = config
        self._model = setup.model
        self.metadata = {"task": config.model_dump(mode="json")}  # with the sizes of buckets that suit the images
        table = build_noise_table(config.noise.zero_terminal_snr)
        self.register_buffer("alphas", table.alpha, persistent=False)  # on the device, so that no step copies them
        self.register_buffer("sigmas", table.sigma, persistent=False)
        self.unet = self.vae = self.text_encoder = self.text_encoder_2 = None
        if config.lora is None:
            trained = ADAPTED if config.train_text_encoders else ("unet",)
            self.take(open_networks(setup.model, trained))
            if config.train_text_encoders:
                for name, parameter in self.text_encoder.named_parameters():  # outputs that do not reach the U-Net
                    if unused_layer(self.text_encoder) in name or "final_layer_norm" in name:
                        parameter.requires_grad_(False)
        else:
            trained = ("adapter",)
            self.adapter = LoRA(adapted_shapes(setup.model), config.lora)
        needed = PARTS if config.text_cache is None else ("unet", "vae")
        self.trained = self.exported = self.averaged = trained
        self.helpers = tuple(name for name in needed if name not in trained)
        self.offloaded = ("vae",)
        if config.text_cache is None and not config.trains_text:
            self.offloaded += ENCODERS

    def take(self, networks: Networks) -> None:
        for name, network in networks.items():
            setattr(self, name, network)

    def load_helpers(self, use: Use) -> None:
        """Load the frozen networks; no export needs them."""
        if use == "export":
            return
        config = self._config
        self.take(open_networks(self._model, self.helpers, frozen=True))
        for name, values in zip(("latent_mean", "latent_factor"), latent_scale(self.vae)):  # on the device
            self.register_buffer(name, values, persistent=False)
        if config.class_words is not None and use == "training":  # as the base encodes them
            embeds, pooled, *_ = zip(*self._encode([Prompt(text=text) for text in config.class_words]))
            padded = pad_sequence([text[0] for text in embeds], batch_first=True)
            self.register_buffer("class_embeds", padded, persistent=False)
            self.register_buffer("class_pooled", torch.cat(pooled), persistent=False)
        if config.lora is not None:
            self.adapter.attach(networks_of(self, ADAPTED))

    def helper_files(self) -> Mapping[str, Sequence[Path]]:
        """Return the files of the base model. Networks without files, the tiny ones, are always the same."""
        return {name: base_files(self._model, (name,)) for name in self.helpers}

    def initialise(self, source: InitFrom | None) -> None:
        """Continue a LoRA or trained networks, or begin with the base model (`model.path`); set `origin`."""
        if (path := self._model.path) is not None:
            facts = describe_base(path)
            self.origin = {"source": path, "layout": facts["layout"], "license": facts["license"]}
            if not self.alphas.is_meta:
                first, *_ = base_files(self._model, ("unet",))
                self.origin["sha256"] = distributed.rank_zero_call(lambda: hash_once(first, FILE_HASHES))
        if source is not None:
            with about("init_from"):
                self._continue(source)

    def _continue(self, source: InitFrom) -> None:
        """Load a LoRA, or the trained networks. Raises UserError for other networks or another noise schedule."""
        path = find_initial(source)
        tensors, metadata = read_weights(path, source.weights)
        noise = self._config.noise
        trained = {} if noise.convert else dict_of(dict_of(metadata, "task"), "noise")
        for name in ("prediction_type", "zero_terminal_snr") if trained else ():
            ours = getattr(noise, name)
            if trained.get(name) != ours:
                raise UserError(f"task.noise.{name}: {ours}, but {path} was trained with {trained.get(name)}; set that")
        advice = (
            "It is neither a U-Net nor a run with the same task.train_text_encoders; a LoRA needs task.lora, and "
            "layers of a kind that can be continued (docs/lora.md)."
        )
        if self._config.lora is not None:
            tensors = adapter_state(path, adapted_shapes(self._model))
        elif any(name.startswith(PREFIXES["unet"]) for name in tensors):
            tensors = from_single_file("unet", tensors)
        refuse_misfits(tensors, split_exported(self, self.state_dict())[0], str(path), advice)
        if not is_meta(self):
            self.load_state_dict(join_exported(self, tensors), strict=False)
        stated = metadata.get("origin") or (read_header(path)[1] if path.suffix == ".safetensors" else {})
        with readable(path, "weight"):
            own = stated.get("license") or stated.get("modelspec.license") or stated_license(source.source)
        base = self.origin or {}
        joined = " and ".join(sorted({own, base.get("license")} - {None})) or None
        self.origin = {"source": str(path), "layout": "init_from", **base, "license": joined}
        log.info("init_from: %s, %d tensors, licences: %s", path, len(tensors), joined or "not stated")

    def write_beside(self, path: Path, metadata: Json) -> None:
        """Write NAME_lora.safetensors, which ComfyUI and the web UIs read, beside weights of a LoRA."""
        if self._config.lora is not None:
            file = path.with_name(f"{path.stem}_lora.safetensors")
            facts = state_facts(path.stem, self._config, metadata, run_of(path))
            save = partial(save_lora, changes=self.adapter.changes(), dtype=torch.float32, facts=facts)
            write_atomically(file, save)

    # ------------------------------------------------------------------------------------------------------ training

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return each sample's weighted error of the prediction."""
        figures, timesteps = self._measure(batch)
        loss = figures.pop("loss")
        logs = {name: log_mean(values, batch["weight"]) for name, values in figures.items()}
        bins = timesteps * _BINS // len(self.alphas)
        for number in range(_BINS):
            logs[f"error_{number}"] = log_mean(figures["error"], batch["weight"] * (bins == number))
        if "is_prior" in batch:
            logs["prior_loss"] = log_mean(loss, batch["weight"] * batch["is_prior"])
        if "loss_weight" in batch:
            loss = loss * batch["loss_weight"]
        return StepOutput(loss, logs)

    def _measure(self, batch: Batch) -> tuple[State, Tensor]:
        """Return the figures of each sample [B], and its timestep.

        error: the mean error, weighed by the mask; loss: weighted by noise level; moved: how far the LoRA moves
        what is to be preserved, weighted so, in training.
        """
        kind = self._config.noise.prediction_type
        loss = self._config.loss
        latents = self._latents(batch)
        config = self._config.timesteps
        times = draw_times(config.sampling, batch["key"], batch["strata"], shift=config.shift)
        least, most = (end / TIMESTEP_COUNT for end in config.range)
        times = least + (most - least) * times
        level, timesteps = find_levels(kind, times, NoiseLevel(self.alphas, self.sigmas))
        noise = rng.normal(batch["key"], latents.shape[1:], NOISE_DRAW)
        if offset := self._config.noise.offset:  # SDXL's base was trained with 0.0357
            noise = noise + offset * rng.normal(batch["key"], (latents.shape[1], 1, 1), OFFSET_DRAW)
        if levels := self._config.noise.multires_iterations:
            noise = add_coarse_noise(noise, batch["key"], levels, self._config.noise.multires_discount)
        added = noise
        if strength := self._config.noise.perturbation:
            added = noise + strength * rng.normal(batch["key"], latents.shape[1:], PERTURBATION_DRAW)
        noisy = add_noise(latents, added, level)
        inputs = [noisy, timesteps, *self._texts(batch), batch["fit"].float()]
        pred = self.predict(*inputs)
        errors = measure_errors(loss, pred, target(kind, latents, noise, level), level, timesteps)
        mask = self._config.mask
        if mask is not None:
            counts = self._find_counts(batch)
            mean = counts.mean(dim=(1, 2, 3), keepdim=True).clamp(min=_LEAST_AREA) if mask.normalise else 1.0
            errors = errors * (counts / mean)
        error = errors.mean(dim=(1, 2, 3))
        weight = loss_weight(loss.weighting, kind, level.snr, loss.gamma, loss.floor)
        figures = {"loss": error * weight, "error": error}
        if self.training and (preserve := self._config.preserve) is not None:
            figures["moved"] = weight * self._find_moved(batch, pred, inputs)
            figures["loss"] = figures["loss"] + preserve.weight * figures["moved"]
        return figures, timesteps

    def _find_moved(self, batch: Batch, pred: Tensor, inputs: list[Tensor]) -> Tensor:
        """Return the mean squared distance [B] of predictions from the base's own, as `PreserveConfig` explains.

        inputs: of `predict`, which gave `pred`.
        """
        if self._config.class_words is not None:
            drawn = (rng.uniform(batch["key"], (), CLASS_DRAW) * len(self.class_embeds)).long()
            inputs[2:4] = self.class_embeds[drawn], self.class_pooled[drawn]
            pred = self.predict(*inputs)
        with torch.no_grad(), self.adapter.off():
            base = self.predict(*inputs)
        squared = (pred - base).square()
        if self._config.class_words is None:
            squared = squared * (1 - batch[MASK].float())
        return squared.mean(dim=(1, 2, 3))

    def _find_counts(self, batch: Batch) -> Tensor:
        """Return the weight of the loss at each place, float32 [B, 1, h, w]."""
        return batch[MASK].float().clamp(min=self._config.mask.floor)

    def predict(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor, pooled: Tensor, ids: Tensor) -> Tensor:
        """Return the U-Net's output, float32 [B, 4, h, w]. On fake tensors, its shapes (sdxl/memory.py).

        ids: float32 [B, 6], never cast: bfloat16 rounds sizes from 1,024 to 2,048 to multiples of 8.
        Source: Podell et al. 2023 (arXiv 2307.01952), section 2.2, micro-conditioning.
        """
        dtype = self.unet.dtype
        mask = None if prompts.shape[1] == LENGTH else prompts.detach().any(dim=-1)  # where there is text
        return self.unet(
            noisy.to(dtype), timesteps, encoder_hidden_states=prompts.to(dtype), encoder_attention_mask=mask,
            added_cond_kwargs={"text_embeds": pooled.to(dtype), "time_ids": ids},
        ).sample.float()  # fmt: skip

    def _latents(self, batch: Batch) -> Tensor:
        """Return scaled latents, float32 [B, 4, h, w], sampled from the VAE's distribution for each image."""
        if "images" in batch:
            with visiting(self.alphas.device, self.vae):
                mean, logvar = encode_images(self.vae, batch["images"])
        else:
            mean = batch["latent_mean"].float()
            logvar = batch["latent_logvar"].float()
        noise = rng.normal(batch["key"], mean.shape[1:], LATENT_DRAW)
        return (mean + torch.exp(0.5 * logvar) * noise - self.latent_mean) * self.latent_factor

    def _texts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return prompt_embeds [B, L, D] and pooled_prompt_embeds [B, P]."""
        if "prompt_embeds" in batch:
            prompts, pooled = batch["prompt_embeds"], batch["pooled_prompt_embeds"]
        else:
            encoders = (self.text_encoder, self.text_encoder_2)
            learns = torch.is_grad_enabled() and self._config.trains_text
            with torch.set_grad_enabled(learns), visiting(self.alphas.device, *encoders):
                prompts, pooled = encode_text(*encoders, batch["token_ids"], batch.get("token_weights"))
        if self._config.captions.dropout_to == "zeros":  # as diffusers' pipelines do, with force_zeros_for_empty_prompt
            dropped = batch["is_dropped"][:, None]
            prompts = prompts.masked_fill(dropped[..., None], 0)
            pooled = pooled.masked_fill(dropped, 0)
        return prompts, pooled

    def after_step(self, step: int, progress: Tensor, applied: Tensor) -> None:
        """Limit the norms of the LoRA."""
        if self._config.lora is not None and (most := self._config.lora.scale_weight_norms):
            self.adapter.limit_norms(most)

    # ---------------------------------------------------------------------------------------------------- evaluation

    def show_inputs(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """Return images, darker where a mask lets the loss count less, and size, crop, weight and caption of each."""
        images = batch["images"].float()
        if MASK in batch:
            images = images * nn.functional.interpolate(self._find_counts(batch), images.shape[-2:])
        texts = []
        for fit, weight, caption in zip(batch["fit"].tolist(), batch["loss_weight"].tolist(), texts_of(batch)):
            height, width, top, left, *_ = fit
            texts.append(f"of {height} x {width}, crop {top}, {left}, weight {weight:.3g}\n{caption or '(no caption)'}")
        return images, texts

    def evaluate(self, loaders: Loaders, step: int) -> Report:
        """Measure the loss of `val` at fixed noise and timesteps, and generate a picture per `task.samples.prompts`.

        `tone_N` is the mean brightness of the N-th prompt's picture, from 0 (black) to 1 (white).
        """
        measured = measure_means(loaders["val"], lambda batch: self._measure(batch)[0])
        drawn = self.draw(loaders.get(COMPARED, ()))
        return replace(drawn, scalars=measured | drawn.scalars)

    def draw(self, trained: Iterable[Batch] = ()) -> Report:
        """Return a picture of each prompt, its brightness, and the nearest `trained` image, if there are any."""
        if not self._config.samples.prompts:
            return Report()
        pictures = self.sample()
        pairs = zip(self._config.samples.complete_all(), find_nearest_images(pictures, trained))
        rows = [{"prompt": prompt.text, **nearest} for prompt, nearest in pairs]
        tones = {f"tone_{number}": float(picture.mean() / 255) for number, picture in enumerate(pictures)}
        height = max(map(len, pictures))
        columns = [np.pad(each, ((0, height - len(each)), (0, 0), (0, 0)), constant_values=255) for each in pictures]
        return Report(tones, {"samples": rows} if rows else {}, {"samples": np.concatenate(columns, axis=1)})

    def sample(self) -> list[np.ndarray]:
        """Return a picture of each prompt of `task.samples`, uint8 [H, W, 3], the same on all ranks."""
        prompts = self._config.samples.complete_all()
        with about("task.samples.sampler"):
            scheduler = scheduler_config(**self._config.stated_noise, sampler=self._config.samples.sampler)
        encoded = self._encode(prompts)
        with naming_memory("task.samples.image_size_hw"), visiting(self.alphas.device, self.vae):
            return list(sample_pictures(self.unet, self.vae, scheduler, prompts, encoded))

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Encode prompts, and the empty prompt in the same way as training.

        With a text cache, the text encoders are loaded, and then leave the memory.
        """
        encoders = [self.text_encoder, self.text_encoder_2]
        if self._config.text_cache is not None:
            encoders = [*open_networks(self._model, ENCODERS, frozen=True).values()]
        with visiting(self.alphas.device, *encoders):
            return [encode_prompt(encoders, prompt, **self._config.encoding) for prompt in prompts]
