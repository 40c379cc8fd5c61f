"""Images that a GPU cuts, because its memory has all of them (data/images/caches.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.augment.steps import CROP, IMAGES, MIRROR
from data.images.caches import Pool
from data.stream.order import Draw, Views
from utils.contracts import Batch
from utils.cut import cut_images

WINDOWS = "windows"


class Windows:
    """The view `windows` in place of `images`, for batches of which a GPU has all images (data/images/caches.py).

    A worker draws the window of a crop alone; the device cuts, resizes and flips. Differs: by a level in some pixels,
    because torch's resize of bytes rounds its weights, too.
    """

    def __init__(self, pool: Pool, views: Views, device: torch.device, rows: Any) -> None:
        """Prepare the views; views: with a TrainTransform that only cuts; rows: of training."""
        self.pool = pool
        self.views = {WINDOWS: self, **{name: view for name, view in views.items() if name != IMAGES}}
        self._steps = views[IMAGES].steps
        self._device = device
        self._rows = rows

    def refresh(self) -> None:
        """Copy the images to the device as soon as they are decoded."""
        self.pool.copy_to(self._device, self._rows)

    def has(self, rows: Sequence[int]) -> bool:
        """Return whether the device has the images of these rows."""
        return bool(self.pool.has_copy[rows].all())

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        """Return the window of a random crop, int64 [5] (utils/cut.py)."""
        crop = self._steps[CROP].cut(image)
        mirrored = MIRROR in self._steps and self._steps[MIRROR].draw()
        return torch.tensor([crop.data_ptr() - self.pool.address, crop.stride(1), *crop.shape[1:], mirrored])

    def on_device(self, batch: Batch) -> Batch:
        """Return the batch with images, which are channels-last, without the windows."""
        crop = self._steps[CROP]
        rest = {name: tensor for name, tensor in batch.items() if name != WINDOWS}
        images = cut_images(self.pool.copy, batch[WINDOWS], self.pool.most, crop.size, crop.interpolation)
        return {IMAGES: images, **rest}
