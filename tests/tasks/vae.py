"""A VAE's decoder is fine-tuned, written as a stranger would: one file, one YAML, one entry in the table.

Half of a network is trained: the encoder is a frozen helper, compared by its hash on resume, so latents stay valid.

    python -m tests.tasks.vae data.root=COLLECTION
"""

from typing import Literal

import torch
from torch import Tensor

from engine.measures.means import measure_means
from engine.task import Report, StepOutput, Task, log_mean
from engine.tasks.kind import ImageTrainingConfig, Kind, TaskConfig
from models.sdxl.networks import SDXLConfig, base_files, open_networks
from tests.tasks.entry import add_kind
from utils.errors import UserError

TRAINED = ("vae.decoder", "vae.post_quant_conv")
FROZEN = ("vae.encoder", "vae.quant_conv")


class VAETaskConfig(TaskConfig):
    """gradient_weight: of the difference between neighbouring pixels, which blurred images lack."""

    name: Literal["vae"]
    gradient_weight: float


class VAEConfig(ImageTrainingConfig):
    model: SDXLConfig
    task: VAETaskConfig


class VAETask(Task):
    trained, exported, helpers = TRAINED, TRAINED, FROZEN
    averaged = dict.fromkeys(TRAINED, "device")
    best_metric, best_is_lowest = "psnr", False

    def __init__(self, setup):
        super().__init__()
        self.model, self.gradient_weight = setup.model, setup.task.gradient_weight
        self.vae = open_networks(setup.model, only=("vae",))["vae"]
        self.vae.encoder = self.vae.quant_conv = None
        self.normalise = setup.normalise()

    def load_helpers(self, use):
        whole = open_networks(self.model, only=("vae",), frozen=True)["vae"]
        self.vae.encoder, self.vae.quant_conv = whole.encoder, whole.quant_conv

    def helper_files(self):
        return dict.fromkeys(FROZEN, base_files(self.model)) if self.model.path else {}

    def initialise(self, source):
        if source is not None:
            raise UserError("init_from: the decoder begins as model.path has it; set init_from=null")

    def _decode(self, batch):
        """Return images and reconstructions, [B, 3, H, W] in [-1, 1]."""
        images = self.normalise(batch["images"])
        with torch.no_grad():
            dtype = next(self.vae.encoder.parameters()).dtype
            mean = self.vae.quant_conv(self.vae.encoder(images.to(dtype))).chunk(2, dim=1)[0]
        return images.float(), self.vae.decoder(self.vae.post_quant_conv(mean.float())).float()

    def _losses(self, images: Tensor, decoded: Tensor) -> dict[str, Tensor]:
        """Return the loss and the peak signal-to-noise ratio in dB of each image, [B]."""
        error = decoded - images
        gradients = error.diff(dim=2).abs().mean(dim=(1, 2, 3)) + error.diff(dim=3).abs().mean(dim=(1, 2, 3))
        squared = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)) / 4
        loss = error.abs().mean(dim=(1, 2, 3)) + self.gradient_weight * gradients
        return {"loss": loss, "psnr": -10 * squared.clamp_min(1e-10).log10()}

    def forward(self, batch, progress):
        losses = self._losses(*self._decode(batch))
        return StepOutput(losses["loss"], {"psnr": log_mean(losses["psnr"], batch["weight"])})

    def evaluate(self, loaders, step):
        return Report(measure_means(loaders["val"], lambda batch: self._losses(*self._decode(batch))))


class VAEKind(Kind):
    config, model, task = VAETaskConfig, SDXLConfig, VAETask


main = add_kind("vae", VAEKind(), VAEConfig)

if __name__ == "__main__":
    main()
