"""Transforms from a decoded image to the uint8 tensor of a batch; random draws come from the sample's key.

The transforms are torchvision's v2; they draw from torch's global generator, which the reader seeds with the key.
Each runs on what it is fastest with, by a factor of 2 to 4 (one thread, 64 and 224 px): crops and resizes on tensors,
affine maps on Pillow's images. RandAugment is timm's, on Pillow's images too.
Normalisation happens on the device (models/normalise.py): a batch carries bytes, a quarter of floats.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2

from data.config import AugmentConfig
from data.stream import Draw
from utils import rng
from utils.canvas import DEFAULT, background_levels, background_of

# Only the middle of a very long image is resized, at most this many times the evaluation size: a strip of 1 x 50,000
# pixels would become one of 256 x 12,800,000. Of one that is padded, all is shrunk to this many times the image size.
_LONGEST = 8
_VARIED = ("bilinear", "bicubic", "lanczos", "area")
FOOTPRINT = "footprint"  # of a sample, uint8 [1, H, W], where padding is ignored
_PILLOWS = {"lanczos": InterpolationMode.LANCZOS, "area": InterpolationMode.BOX}


class Transform(Protocol):
    """From uint8 [C, H, W] of any size to uint8 [C, h, w] of the size that the draw's group has.

    A view that is no image may be any tensor of one shape (data/device_augment.py: parameters for the device).
    """

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        """Return the transformed image."""
        ...


Views = Mapping[str, Transform]
Sized = TypeVar("Sized")


class ByGroup:
    """The transform of the draw's group: one for each bucket."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self._transforms = transforms

    @classmethod
    def views(cls, each: Sequence[Sized], make: Callable[[Sized], Views]) -> Views:
        """Return views of all groups; those of group n are what `make` gives for the n-th of `each`."""
        views = [make(one) for one in each]
        return views[0] if len(views) == 1 else {name: cls([view[name] for view in views]) for name in views[0]}

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        """Return the transformed image."""
        return self._transforms[draw.group](image, draw)


def resize(image: Tensor, size_hw: Sequence[int], interpolation: str) -> Tensor:
    """Return an image, uint8 [C, H, W], resized.

    lanczos and area are Pillow's: not every torchvision has them for tensors. area, a box, repeats pixels to enlarge.
    The others are torch's; its kernel is fastest where a pixel's channels are neighbours, as decoders leave them.
    """
    if interpolation in _PILLOWS:
        picture = v2.functional.to_pil_image(image)
        return v2.functional.pil_to_tensor(v2.functional.resize(picture, list(size_hw), _PILLOWS[interpolation]))
    if tuple(size_hw) == tuple(image.shape[1:]):
        return image
    if image.stride(0) == 1:  # of a part of an image too, whose rows have gaps
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    # Not `image[None]`: its first stride would hide the order of the channels from the kernel.
    batch = image.as_strided((1, *image.shape), (image.numel(), *image.stride()))
    return F.interpolate(batch, list(size_hw), mode=interpolation, antialias=True)[0]


class Letterbox:
    """Put the whole image, uint8 [C, H, W], into the middle of a square; an odd pixel goes to the right or the bottom.

    The square has the colour of the background (utils/canvas.py); for `drop`, which states none, it is white. pad: of
    AugmentConfig; with buckets the canvas has the ratio of `image_size_hw` and is no square.
    """

    def __init__(self, image_size_hw: Sequence[int], background: Any, pad: str = "square") -> None:
        self._longest, self._background = _LONGEST * max(image_size_hw), background
        self._ratio_hw = tuple(image_size_hw) if pad == "buckets" else (1, 1)

    @classmethod
    def steps(cls, image_size_hw: Sequence[int], background: Any, pad: str) -> list[Self]:
        """Return what comes before all other steps: nothing where `pad` is none."""
        return [] if pad == "none" else [cls(image_size_hw, background, pad)]

    def __call__(self, image: Tensor) -> Tensor:
        """Return the canvas, which is as high or as wide as the image: [C, h, w]."""
        shrink = self._longest / max(image.shape[-2:])
        if shrink < 1:
            image = resize(image, [max(1, round(side * shrink)) for side in image.shape[-2:]], "bicubic")
        channels, height, width = image.shape
        tall, wide = self._ratio_hw
        rows, columns = max(height, -(-width * tall // wide)), max(width, -(-height * wide // tall))
        levels = torch.tensor(background_levels(self._background, channels), dtype=torch.uint8)
        canvas = levels.repeat(rows, columns, 1).permute(2, 0, 1)
        top, left = (rows - height) // 2, (columns - width) // 2
        canvas[:, top : top + height, left : left + width] = image
        return canvas


class NoiseErasing(v2.RandomErasing):
    """Erase a rectangle of 2 to 33 % of the image with noise, for which torchvision's own takes floats only.

    The noise is uniform over bytes, or, where `mean` and `std` are given, normal.
    Differs: published code draws normal noise after the normalisation; here it is rounded to bytes and clipped to
    black and white.
    """

    def __init__(self, p: float, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__(p=p, scale=(0.02, 1 / 3), value=0)
        self._mean, self._std = (
            None if values is None else 255.0 * torch.tensor(values).view(-1, 1, 1) for values in (mean, std)
        )

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """Return the image with noise in the drawn rectangle, or as it was where none was drawn."""
        if params["v"] is not None:
            params = {**params, "v": self._noise((inpt.shape[-3], params["h"], params["w"])).to(inpt)}
        return super().transform(inpt, params)

    def _noise(self, shape: tuple[int, ...]) -> Tensor:
        if self._mean is None:
            return torch.randint(0, 256, shape)
        return (self._mean + self._std * torch.randn(shape)).round().clamp(0, 255)


class PolicyAugment(v2.Transform):
    """timm's RandAugment by its policy string, on Pillow's images.

    timm draws from Python's and NumPy's generators, which are seeded from torch's here: the result depends on the
    sample's key alone.
    """

    def __init__(self, config: AugmentConfig) -> None:
        super().__init__()
        from timm.data.auto_augment import posterize, rand_augment_transform  # takes 0.8 s, so only where it is used

        mean = tuple(round(255 * value) for value in config.mean)
        settings = {
            "translate_const": int(0.45 * min(config.image_size_hw)),
            "img_mean": mean if len(mean) > 1 else mean[0],
            # Pillow's affine maps have these two alone.
            "interpolation": {"bilinear": Image.Resampling.BILINEAR}.get(
                config.interpolation, Image.Resampling.BICUBIC
            ),
        }
        assert config.rand_augment is not None
        self._policy = rand_augment_transform(config.rand_augment, settings)
        for operation in self._policy.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize

    def transform(self, inpt: Image.Image, params: dict[str, Any]) -> Image.Image:
        """Return the augmented image."""
        with rng.seeded_python(int(torch.randint(2**31, ()))):
            return self._policy(inpt)


def on_pillow(transform: v2.Transform) -> list[torch.nn.Module]:
    """Return the steps that apply a transform to the image as Pillow has it; from and to uint8 [C, H, W], C 1 or 3."""
    return [v2.ToPILImage(), transform, v2.PILToTensor()]


def random_affine(config: AugmentConfig) -> v2.RandomAffine:
    """Return the random affine map of `augment.affine`, which is not null."""
    affine = config.affine
    assert affine is not None
    return v2.RandomAffine(
        affine.degrees,
        translate=(affine.translate, affine.translate),
        scale=tuple(affine.scale),
        shear=[-affine.shear_degrees, affine.shear_degrees] * 2,
        interpolation=InterpolationMode.BILINEAR,
        fill=config.fill,
    )


def color_jitter(config: AugmentConfig) -> v2.ColorJitter:
    """Return the random colours of `augment.color_jitter`, which is not null."""
    jitter = config.color_jitter
    assert jitter is not None
    return v2.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)


class Mirror:
    """Mirror an image left to right with a probability."""

    def __init__(self, p: float) -> None:
        self._p = p

    def __call__(self, image: Tensor) -> Tensor:
        """Return the image, or its mirror image."""
        return image.flip(-1) if torch.rand(()).item() < self._p else image


class ResizedCrop(v2.RandomResizedCrop):
    """The random crop of `augment`, resized to the image size by its interpolation."""

    def __init__(self, config: AugmentConfig) -> None:
        height, width = config.image_size_hw if config.pad == "buckets" else (1, 1)
        ratio = [stated * width / height for stated in config.crop_ratio]
        super().__init__(config.image_size_hw, scale=config.crop_scale, ratio=ratio)
        self._log_ratio = self._log_ratio.tolist()  # tensors as bounds make a draw half as long again
        self._choices = _VARIED if config.interpolation == "varied" else (config.interpolation,)

    def __call__(self, image: Tensor) -> Tensor:
        """Return a drawn crop, resized. Differs: v2 pads crops that reach beyond the image; these never do."""
        top, left, height, width = self.make_params([image]).values()
        choice = int(torch.randint(len(self._choices), ())) if len(self._choices) > 1 else 0
        return resize(image[:, top : top + height, left : left + width], self.size, self._choices[choice])


class InSteps:
    """Steps, one after the other; plain calls, because v2.Compose looks for images in nested inputs at each step."""

    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        self._steps = steps

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        """Return the transformed image."""
        for step in self._steps:
            image = step(image)
        return image


class CropTransform(InSteps):
    """The random resized crop alone, of the padded image: what a worker does where `augment.on_device` is true."""

    def __init__(self, config: AugmentConfig, background: Any = DEFAULT) -> None:
        super().__init__([*Letterbox.steps(config.image_size_hw, background, config.pad), ResizedCrop(config)])


class TrainTransform(InSteps):
    """Affine map, random resized crop, mirror, colours, RandAugment and erasing, all in the worker (`augment`).

    background: of the canvas that `augment.pad` puts the image on first.
    Source: RandAugment, Cubuk et al. 2019 (arXiv 1909.13719); random erasing, Zhong et al. 2017 (arXiv 1708.04896).
    """

    def __init__(self, config: AugmentConfig, background: Any = DEFAULT) -> None:
        steps: list[Any] = Letterbox.steps(config.image_size_hw, background, config.pad)
        if config.affine is not None:
            # Before the resize: after it, training images would be blurred and validation images not.
            steps += on_pillow(random_affine(config))
        steps.append(ResizedCrop(config))
        if config.horizontal_flip > 0:
            steps.append(Mirror(config.horizontal_flip))
        if config.color_jitter is not None:
            steps.append(color_jitter(config))
        if config.rand_augment is not None:
            steps += on_pillow(PolicyAugment(config))
        if config.random_erasing > 0:
            noise = (config.mean, config.std) if config.erasing_noise == "normal" else ()
            steps.append(NoiseErasing(config.random_erasing, *noise))
        super().__init__(steps)


class Footprint:
    """Which pixels of the view `images` are the image's own and not padding: 255 or 0, uint8 [1, h, w].

    The same view of a white image on black, by the same draws. transform: of that view, without changes of colour.
    """

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    @classmethod
    def of_training(cls, config: AugmentConfig) -> Self:
        """Return that of the view that `TrainTransform` makes of a config without `rand_augment`."""
        changes = {"color_jitter": None, "random_erasing": 0.0, "fill": 0}
        return cls(TrainTransform(config.model_copy(update=changes), "black"))

    @classmethod
    def of_evaluation(cls, preprocessing: Mapping[str, Any]) -> Self:
        """Return that of the view that `EvalTransform` makes."""
        return cls(EvalTransform.of({**preprocessing, "background": "black"}))

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        """Return the footprint of an image."""
        with rng.seeded(draw.key):  # that of the first view; this one has another
            return self._transform(torch.full_like(image[:1], 255), draw)


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the upper bits of each channel; none, which Pillow 13 refuses and timm asks for, makes the image black."""
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else image.point(lambda _: 0)


def in_buckets(preprocessing: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the preprocessing in each bucket that a weight file states; where it states none, as it is."""
    buckets_hw = preprocessing.get("buckets_hw")
    if buckets_hw is None:
        return [preprocessing]
    return [{**preprocessing, "pad": "buckets", "image_size_hw": size_hw} for size_hw in buckets_hw]


def shortest_px_for(augment: AugmentConfig) -> int | None:
    """Return how far the shorter side of an image may be shrunk when it is decoded, in pixels; None: not at all.

    No crop is enlarged because of it. The rule depends on `augment` alone, and holds with and without a cache.
    The bound is the larger of two. Evaluation resizes to image size / `eval_crop`, or to the image size. Training takes
    a crop of at least `crop_scale` of the area; of an image with shorter side s it is, at a ratio r = width / height,
    at least s sqrt(scale r) wide and s sqrt(scale / r) high, and where no crop fits, s or s times the nearest ratio.
    A worker's affine map enlarges the crop's content at most by its zoom and both shears. A padded image is a square of
    the longer side, so the bound holds for it, too.
    """
    if not augment.shrink:
        return None
    height, width = augment.image_size_hw
    evaluation = max(height, width) / (augment.eval_crop if augment.eval_resize == "crop" else 1)
    scale, (least, most) = augment.crop_scale[0], augment.crop_ratio
    wide = max(1 / math.sqrt(scale * least), 1 / most)
    high = max(math.sqrt(most / scale), least)
    stretch, affine = 1.0, augment.affine  # how many times an affine map of the worker enlarges a length at most
    if affine is not None and not augment.on_device:
        stretch = max(1.0, affine.scale[1] * (1 + math.tan(math.radians(affine.shear_degrees))) ** 2)
    return math.ceil(max(evaluation, stretch * max(width * wide, height * high)))


def preprocessing_of(augment: AugmentConfig, channels: int) -> dict:
    """Return what evaluation does to an image (AugmentConfig.preprocessing), with `shortest_px` where it is shrunk."""
    shortest_px = shortest_px_for(augment)
    return {**augment.preprocessing(channels), **({} if shortest_px is None else {"shortest_px": shortest_px})}


def evaluation_views(preprocessing: Mapping[str, Any]) -> Views:
    """Return the one view of an evaluation image."""
    return {"images": EvalTransform.of(preprocessing)}


class EvalTransform:
    """The shorter side to image size / eval_crop, rounded down, then the centre; or both to image size (`squash`).

    letterbox: what pads the image first, or nothing.
    """

    def __init__(
        self,
        image_size_hw: Sequence[int],
        eval_crop: float,
        interpolation: str,
        eval_resize: str = "crop",
        letterbox: Sequence[Letterbox] = (),
    ) -> None:
        height, width = image_size_hw
        self._squash = eval_resize == "squash"
        self._size_hw = (height, width)
        self._resized_hw = (math.floor(height / eval_crop), math.floor(width / eval_crop))
        self._interpolation, self._letterbox = interpolation, letterbox

    @classmethod
    def of(cls, preprocessing: Mapping[str, Any]) -> Self:
        """Return the transform that a weight file's preprocessing states (AugmentConfig.preprocessing)."""
        size_hw = preprocessing["image_size_hw"]
        return cls(
            size_hw,
            preprocessing["eval_crop"],
            preprocessing["interpolation"],
            preprocessing.get("eval_resize", "crop"),  # older files state neither this nor the padding
            Letterbox.steps(size_hw, background_of(preprocessing), preprocessing.get("pad", "none")),
        )

    def __call__(self, image: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the resized image or its centre, [C, H, W].

        The centre has the pixels of torchvision's resize and centre crop of the whole image. Only the middle of a long
        image is resized, because the whole could exceed the memory.
        """
        for step in self._letterbox:
            image = step(image)
        if self._squash:
            return resize(image, self._size_hw, self._interpolation)
        factor = max(resized / side for resized, side in zip(self._resized_hw, image.shape[-2:]))
        whole_hw = [max(least, _resized(side, factor)) for least, side in zip(self._size_hw, image.shape[-2:])]
        middle = _cut_middle(image, [math.ceil(_LONGEST * side / factor) for side in self._resized_hw])
        starts, middle_hw = [], []
        for side, whole, kept in zip(middle.shape[-2:], whole_hw, self._size_hw):
            resized = _resized(side, factor)
            resized += (whole - resized) % 2  # odd or even as the whole, whose centre it shares then
            starts.append(round((whole - kept) / 2) - (whole - resized) // 2)
            middle_hw.append(resized)
        return v2.functional.crop(resize(middle, middle_hw, self._interpolation), *starts, *self._size_hw)


def _resized(side: int, factor: float) -> int:
    """Return a side's resized length: rounded down, as torchvision does; 1e-6 is for the side that sets the factor."""
    return int(side * factor + 1e-6)


def _cut_middle(image: Tensor, most_hw: Sequence[int]) -> Tensor:
    """Cut sides longer than `most_hw` to their middle; one pixel more where the centre would move by half a pixel."""
    for axis, most in zip((-2, -1), most_hw):
        side = image.shape[axis]
        kept = most + (side - most) % 2
        if side > kept:
            image = image.narrow(axis, (side - kept) // 2, kept)
    return image
