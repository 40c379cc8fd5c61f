"""An autoencoder: the decoder of SDXL's VAE learns the images of a collection, while the encoder stays as it is.

Latents, caches and U-Nets therefore stay valid. A sample has `images` alone, uint8 [B, 3, H, W]: a random crop of an
image in its bucket, in evaluation the whole bucket. Training decodes the mean of the latents: the variance of an
untrained encoder hides the image. The loss is pixels + weight x perceptual distance. A discriminator adds its hinge
loss, and a loss of the decoder, with a weight that makes both gradients of the last layer equally large.

Source: Esser et al. 2021 (arXiv 2012.09841), equations 5 and 7; Rombach et al. 2022 (arXiv 2112.10752), appendix G.
Differs: the adaptive weight is that of the step before, from the gradients of all ranks and micro-batches.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.func import functional_call

from data.collection.collection import Collection
from data.open import Data
from data.stream.loader import no_fields
from data.stream.order import Draw
from engine.config import TrainingConfig
from engine.measures.images import measure_psnr, measure_ssim
from engine.measures.means import Means
from engine.measures.top_samples import TopSamples
from engine.task import Loaders, Report, StepOutput, Task, Use, log_mean
from engine.tasks.change import ConfigChange
from engine.tasks.kind import Kind, Setup
from sdxl.autoencoder_losses import PatchDiscriminator, PerceptualNetwork, absolute_error, hinge, pyramid_distance
from sdxl.caches.buckets import fitted_views
from sdxl.config import SDXLConfig
from sdxl.kind import BucketedKind, Reading, find_buckets
from sdxl.networks import describe_base, open_networks
from sdxl.settle import FIT, settle_vae
from sdxl.step import encode_images, to_bytes, to_levels
from utils.contracts import Batch, InitFrom, State
from utils.errors import UserError
from utils.io.files import Json
from utils.io.hub import stated_license
from utils.ranks import distributed
from utils.record import pictures
from utils.record.logging import log

_WORST = 4  # pictures of an evaluation
_AMPLIFIED = 4  # times the difference in a picture
_MOST_ADAPTIVE = 1e4  # as published
_LEAST_NORM = 1e-4  # as published


class AutoencoderTask(Task):
    """Own the VAE, the perceptual network and the discriminator, as far as the configuration has them."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        config = setup.task
        self._config = config
        self._model = setup.model
        self.metadata = {"task": config.model_dump(mode="json")}  # with the sizes of buckets that suit the images
        self.vae = open_networks(setup.model, ("vae",))["vae"]
        self.vae.encoder = self.vae.quant_conv = None
        self.trained = self.exported = self.averaged = ("vae.decoder", "vae.post_quant_conv")
        self.helpers = ("vae.encoder", "vae.quant_conv", "perceptual")
        for name, parameter in self.vae.named_parameters():
            if name.endswith("to_k.bias"):  # softmax cancels it: Adam would make steps of the gradient's rounding
                parameter.requires_grad_(False)
        self.perceptual = self.discriminator = None
        player = config.discriminator
        if player.weight:
            self.discriminator = PatchDiscriminator()
            self.trained = (*self.trained, "discriminator")
            last = self.vae.decoder.conv_out.weight
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
            self.register_buffer("balance", torch.zeros(()))
            # Of this step: the last layer's gradients of both losses, summed over samples, and the samples' weights.
            self.register_buffer("pull", torch.zeros(2 * last.numel() + 1))

    def load_helpers(self, use: Use) -> None:
        """Load the frozen encoder, and the perceptual network unless for an export."""
        whole = open_networks(self._model, ("vae",), frozen=True)["vae"]
        self.vae.encoder = whole.encoder
        self.vae.quant_conv = whole.quant_conv
        if self._config.perceptual.network is not None and use != "export":
            self.perceptual = PerceptualNetwork(self._config.perceptual)
            self.perceptual.load()

    def initialise(self, source: InitFrom | None) -> None:
        """Keep the VAE of the base model, and set `origin` to its description."""
        model = self._model
        if path := model.vae or model.path:
            licence = stated_license(path) if model.vae else describe_base(path)["license"]
            self.origin = {"source": path, "layout": "VAE", "license": licence}

    # ------------------------------------------------------------------------------------------------------ training

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return each sample's loss, the discriminator's included."""
        images, decoded, _ = self._reconstruct(batch)
        loss, parts = self._compare(images, decoded)
        if self.discriminator is not None and torch.is_grad_enabled():
            player = self._config.discriminator
            # A loss has gradients for its own player alone.
            still = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
            theirs = -functional_call(self.discriminator, still, decoded).float().mean(dim=(1, 2, 3))
            judged = hinge(self.discriminator(images).float(), self.discriminator(decoded.detach()).float())
            self._note_gradients(loss, theirs, batch["weight"])
            parts |= {"fooled": theirs, "discriminator": judged}
            added = player.weight * self.balance * theirs + judged
            loss = loss + added.where(self.updates >= player.start_step, 0.0)
        return StepOutput(loss, {name: log_mean(part, batch["weight"]) for name, part in parts.items()})

    def _reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images of a batch, what the decoder makes of them, both from -1 to 1, and the latents' mean."""
        latents = encode_images(self.vae, batch["images"])[0]
        return to_levels(batch["images"]), self._decode(latents), latents

    def _decode(self, latents: Tensor) -> Tensor:
        """Return images, float32; a VAE that overflows in float16 (`force_upcast`) decodes in float32."""
        device = latents.device.type
        overflows = torch.get_autocast_dtype(device) == torch.float16 and self.vae.config.force_upcast
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not overflows):
            return self.vae.decode(latents).sample.float()

    def _compare(self, images: Tensor, decoded: Tensor) -> tuple[Tensor, State]:
        """Return the loss of each image [B] without the players', and its parts."""
        pixel = absolute_error(decoded - images)
        with torch.autocast(images.device.type, enabled=False):
            distance = pyramid_distance if self.perceptual is None else self.perceptual
            perceptual = distance(images, decoded)
        return pixel + self._config.perceptual.weight * perceptual, {"pixel": pixel, "perceptual": perceptual}

    @torch.compiler.disable
    def _note_gradients(self, ours: Tensor, theirs: Tensor, weight: Tensor) -> None:
        """Add the last layer's gradients of both losses of a micro-batch."""
        last = self.vae.decoder.conv_out.weight
        sums = [torch.where(weight > 0, loss * weight, 0.0).sum() for loss in (ours, theirs)]
        pulls = [torch.autograd.grad(total, last, retain_graph=True)[0].flatten() for total in sums]
        self.pull += torch.cat([*pulls, weight.sum()[None]]).float()

    def after_step(self, step: int, progress: Tensor, applied: Tensor) -> None:
        """Compute the next step's adaptive weight."""
        if self.discriminator is None:
            return
        self.updates.fill_(step + 1)
        pull = distributed.all_reduce_sum(self.pull)
        ours, theirs = (pull[:-1] / pull[-1].clamp_min(1e-6)).chunk(2)
        balance = (ours.norm() / (theirs.norm() + _LEAST_NORM)).clamp(0, _MOST_ADAPTIVE)
        self.balance.copy_(torch.where(pull[-1] > 0, balance, self.balance))  # 0: the step was skipped
        self.pull.zero_()

    # ---------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, loaders: Loaders, step: int) -> Report:
        """Measure the images of `val`, each decoded from its latents' mean, and draw the worst ones.

        Table: `latents`, of their channels. `scaling_factor` would give them a deviation of 1.
        Source: Rombach et al. 2022, appendix G. Differs: all validation images instead of a first batch.
        """
        means = Means()
        worst = TopSamples(_WORST)
        latents = []
        for batch in loaders["val"]:
            figures, decoded, found = self._measure(batch)
            valid = batch["weight"] > 0
            latents.append(found[valid].cpu())
            means.add(figures, valid)
            shown = {"decoded": to_bytes(decoded), "psnr": figures["psnr"]}
            worst.add(-figures["psnr"], valid, {"sample_id": batch["sample_id"], "images": batch["images"], **shown})
        moments = np.concatenate(distributed.gather_objects(torch.cat(latents).numpy()))
        mean, square, *_ = moments.mean(axis=0)
        columns = {"channel": np.arange(len(mean)), "mean": mean, "deviation": np.sqrt(square - mean**2)}
        columns |= {"least": moments.min(axis=0)[2], "greatest": moments.max(axis=0)[3]}
        factor = float((square.mean() - mean.mean() ** 2) ** -0.5)
        stated = self.vae.config.scaling_factor
        log.info("latents: a scaling factor of %.4g gives them a deviation of 1; the VAE states %.4g", factor, stated)
        drawn = {"worst": _draw_worst(worst.reduce())}
        return Report({**means.reduce(), "scaling_factor": factor}, {"latents": pa.table(columns).to_pylist()}, drawn)

    def _measure(self, batch: Batch) -> tuple[State, Tensor, Tensor]:
        """Return the figures of each image [B], the decoded images, and the moments of the latents."""
        images, decoded, latents = self._reconstruct(batch)
        loss, parts = self._compare(images, decoded)
        shown = (images + 1) / 2, (decoded.clamp(-1, 1) + 1) / 2
        figures = {"loss": loss, "psnr": measure_psnr(*shown), "ssim": measure_ssim(*shown), **parts}
        values = latents.double().flatten(2)
        moments = [values.mean(2), values.square().mean(2), values.amin(2), values.amax(2)]
        return figures, decoded, torch.stack(moments, dim=1)


def _draw_worst(worst: Mapping[str, np.ndarray]) -> np.ndarray:
    """Draw the worst images: the original, the decoded image, and the difference, amplified."""
    images, decoded = (worst[name].transpose(0, 2, 3, 1) for name in ("images", "decoded"))
    difference = np.abs(images.astype(int) - decoded) * _AMPLIFIED
    rows = np.concatenate([images, decoded, difference.clip(0, 255).astype(np.uint8)])
    captions = [[(f"{psnr:.1f} dB", pictures.WRONG)] for psnr in worst["psnr"]]
    title = f"Lowest PSNR; from the top: images, decoded, {_AMPLIFIED} x difference"
    return pictures.image_grid(rows, captions * 3, title, columns=len(images), tile_px=226)


class AutoencoderKind(BucketedKind):
    """SDXL's VAE on the images of a collection."""

    model = SDXLConfig
    task = AutoencoderTask
    changes = (ConfigChange(settle_vae, "the VAE has these values"), FIT, *Kind.changes)
    next_commands = ("python export.py format=vae run_dir={run}",)

    def find_facts(self, config: TrainingConfig, collection: Collection) -> Json:
        """Check the perceptual network and its files. There are no facts."""
        if (perceptual := config.task.perceptual).network is not None:
            with torch.device("meta"):
                network = PerceptualNetwork(perceptual)
                if perceptual.path is not None:
                    network.load()
        return {}

    def read(self, data: Data, setup: Setup, rows: np.ndarray, parts: int, *, training: bool) -> Reading:
        """Return the images of some rows, in training random crops. Raises UserError (`task.crop_px`)."""
        crop_px = setup.task.crop_px
        buckets = find_buckets(data, setup, rows)
        view = fitted_views(buckets.draw_fit)["images"]
        if training:
            least = buckets.sizes_hw.min(initial=crop_px)
            if least < crop_px:
                raise UserError(f"task.crop_px: {crop_px} is more than a bucket's side of {least} px; set at most that")

        def crop(image: Tensor, draw: Draw) -> Tensor:
            """Return a random square of an image in its bucket, drawn from the sample's key."""
            whole = view(image, draw)
            top, left = (int(torch.randint(side - crop_px + 1, ())) for side in whole.shape[-2:])
            return whole[:, top : top + crop_px, left : left + crop_px]

        return buckets, data, {"images": crop if training else view}, no_fields
