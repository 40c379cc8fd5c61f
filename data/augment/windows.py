"""Images that a GPU cuts, because its memory has a copy of all decoded ones (data/images/caches.py)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from data.augment.steps import CROP, IMAGES, MIRROR
from data.images.caches import BEHIND, Pool
from data.stream.order import Views
from utils import rng
from utils.contracts import Batch
from utils.cut import cut_images
from utils.record.logging import log

WINDOWS = "windows"
_SHARE = 0.25  # of the free memory of a GPU, for the copy and the tables of weights
_MOST_SIDE = 1536  # of a window
_ENOUGH = 0.999  # share of the images that a copy needs; workers make a batch that lacks one
_PART_BYTES = 2**25  # of the copy at each step: 4 ms, in which the host waits for workers or the GPU


class Windows:
    """The view `windows` in place of `images`, for batches of which a GPU has all images.

    A worker draws the windows of crops alone; the device cuts, resizes and flips. Differs: by a level in some pixels,
    because torch's resize of bytes rounds its weights, too.
    """

    def __init__(self, pool: Pool, views: Views, device: torch.device, rows: ndarray) -> None:
        """Prepare the views; views: with a TrainTransform that only cuts; rows: of training."""
        self.views = {WINDOWS: self, **{name: view for name, view in views.items() if name != IMAGES}}
        self._steps = views[IMAGES].steps
        self._pool = pool
        self._content = torch.from_numpy(pool.content)  # of the host, until the copy is whole
        self._has = torch.zeros(1 + max(rows, default=0), dtype=torch.bool).share_memory_().numpy()  # for workers
        self._copying = self._copy(device, rows)

    def refresh(self) -> None:
        """Copy a part of the images to the device, as soon as they are decoded."""
        next(self._copying, None)

    def _copy(self, device: torch.device, rows: ndarray) -> Iterator[None]:
        """Copy all records, if they and the tables of weights fit, a part at each step. Later ones are left to workers.

        A window is read as if it were as large as the largest, but for the largest of each 2,000 images, which workers
        cut. It has the ratio of a crop, so that of a panorama is not as long as the panorama.
        """
        while self._pool.has(rows[:: 1 + len(rows) // 1000]).mean() < _ENOUGH:  # of a sample: each step asks
            yield
        rows = rows[self._pool.has(rows)]
        crop = self._steps[CROP]
        _, shapes = self._pool.heads(rows)
        sides = shapes[:, :2]
        windows = np.minimum(sides, sides[:, ::-1] * [1 / crop.ratio[0], crop.ratio[1]] + 1).astype(int)
        limits = np.quantile(windows, 1 - (1 - _ENOUGH) / 2, axis=0, method="higher").clip(max=_MOST_SIDE)
        chosen = (windows <= limits).all(axis=1)
        self._most = [*windows[chosen].max(axis=0, initial=1).tolist(), int(shapes[0, 2])]
        size = self._pool.used_bytes()
        tables = sum(2 * longest**2 * side for longest, side in zip(self._most, crop.size))  # float16, of utils/cut.py
        if chosen.mean() < _ENOUGH or size + tables > _SHARE * torch.cuda.mem_get_info(device)[0]:
            return
        room = torch.empty(size + BEHIND, dtype=torch.uint8, device=device)
        for part, place in zip(self._content[:size].split(_PART_BYTES), room.split(_PART_BYTES)):
            place[: len(part)].copy_(part.pin_memory() if room.is_cuda else part, non_blocking=True)
            yield
        self._content = room
        self._has[rows[chosen]] = True
        log.debug("data.cache.memory_gib: the device cuts %d images", chosen.sum())

    def drop(self) -> bool:
        """Free the copy, and make no other; the host cuts the batches that wait. Return whether there was one."""
        had_any = bool(self._has.any())
        self._copying.close()
        self._content = torch.from_numpy(self._pool.content)
        self._has[:] = False
        return had_any

    def has(self, rows: Sequence[int]) -> bool:
        """Return whether the device has the images of these rows."""
        return bool(self._has[rows].all())

    def draw(self, rows: list[int], keys: list[int]) -> Tensor:
        """Return the windows of random crops, int64 [B, 5] (utils/cut.py): those that workers cut with these keys."""
        windows = []
        places, shapes = self._pool.heads(rows)
        for _, place, (height, width, channels) in zip(rng.seeded_each(keys), places.tolist(), shapes.tolist()):
            top, left, *shape = self._steps[CROP].draw(height, width)
            mirrored = MIRROR in self._steps and self._steps[MIRROR].draw()
            stride = width * channels
            windows.append([place + top * stride + left * channels, stride, *shape, mirrored])
        return torch.tensor(windows)

    def on_device(self, batch: Batch) -> Batch:
        """Return the batch with images, which are channels-last, without the windows."""
        crop = self._steps[CROP]
        rest = dict(batch)
        windows = rest.pop(WINDOWS)
        on_device = windows.to(self._content.device)
        images = cut_images(self._content, on_device, self._most, crop.size, crop.interpolation)
        return {IMAGES: images.to(windows.device), **rest}
