"""The size rule: no crop of an image at the bound is smaller than the network's input, and the bound is not idle."""

import itertools

import pytest

from data.augment.config import AugmentConfig
from data.augment.transforms import ResizedCrop
from tests.in_process import SHORT, SMALL_MODEL, make_images, run
from tests.support import logged, read_conf, refuses
from utils import rng
from utils.io.files import read_json
from utils.io.weights import read_weights

LIGHT = read_conf("augment/light") | {"shrink": True}
AFFINE = {"degrees": 5.0, "translate": 0.1, "scale": [0.8, 1.5], "shear_degrees": 0.0}


def bound(**changes):
    return AugmentConfig(**LIGHT | changes).shortest_px()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"shrink": False}, None),
        ({"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]}, 256),  # 224 / 0.875
        ({"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "eval_resize": "squash"}, 224),
        ({"crop_scale": [0.08, 1.0]}, 915),  # 224 / sqrt(0.08 x 0.75)
        ({"crop_scale": [0.25, 1.0], "crop_ratio": [1.0, 1.0]}, 448),
        ({"crop_scale": [0.25, 1.0], "crop_ratio": [1.0, 1.0], "affine": AFFINE}, 672),
        ({"crop_scale": [0.25, 1.0], "crop_ratio": [1.0, 1.0], "affine": AFFINE, "on_device": True}, 448),
    ],
)
def test_bounds(changes, expected):
    assert bound(**changes) == expected


RATIOS = ([0.75, 4 / 3], [1.0, 1.0], [2.0, 3.0], [0.2, 0.4], [4.0, 4.0])
SIZES = ([32, 32], [48, 16], [16, 40])


@pytest.mark.parametrize("ratio, scale, size_hw", itertools.product(RATIOS, (0.05, 0.5, 1.0), SIZES))
def test_no_crop_of_an_image_at_the_bound_is_enlarged(ratio, scale, size_hw):
    config = AugmentConfig(**LIGHT | {"crop_ratio": ratio, "crop_scale": [scale, 1.0], "image_size_hw": size_hw})
    side, crop = config.shortest_px(), ResizedCrop(config)
    with rng.seeded(3):
        for length in (1.0, 1.3, 4.0):
            for shape in ((side, int(side * length)), (int(side * length), side)):
                for _ in range(20):
                    _, _, height, width = crop.draw(*shape)
                    assert height >= size_hw[0] and width >= size_hw[1]


def test_an_evaluation_shrinks_as_the_run_did(tmp_path):
    root = make_images(tmp_path / "images")  # of 36 to 60 px
    command = [*SMALL_MODEL, *SHORT, "data=image_folder", f"data.root={root}", "run_dir=run", "augment=light"]
    command += ["augment.shrink=true", "augment.crop_scale=[1.0,1.0]", "augment.crop_ratio=[1.0,1.0]"]
    run("finetune", command, tmp_path)
    weights = tmp_path / "run/weights/last_weights.safetensors"
    assert read_weights(weights)[1]["preprocessing"]["shortest_px"] == 19  # 16 / 0.875
    run("evaluate", ["run_dir=run", "weights=last", "runtime.device=cpu"], tmp_path)
    expected = logged(tmp_path / "run", "evaluate", "loss")[-1]
    found = read_json(tmp_path / "run/metrics_last.json")["loss"]
    assert found == pytest.approx(expected, rel=1e-6)
    with refuses(r"augment.shrink: True in the run, False now"):
        run("finetune", [*command, "augment.shrink=false", "loop.total_steps=3"], tmp_path)
