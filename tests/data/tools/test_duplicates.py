"""Near-duplicates. Reference equality: scipy's DCT, and connected components of all distances. Properties: copies fall
together, other pictures do not; `prepare.py job=manifest job.duplicates=true` fills in the columns."""

import io

import numpy as np
from PIL import Image, ImageDraw
from scipy.fft import dctn
from scipy.sparse.csgraph import connected_components

from data.collection.collection import Collection
from data.collection.duplicates import group_duplicates, perceptual_hash
from tests.data.collection.test_collection import load
from tests.in_process import run

ODD = 0x5555555555555555  # the bits of the odd horizontal frequencies


def picture(seed, size=(150, 101)):
    generator = np.random.default_rng(seed)
    image = Image.fromarray(generator.integers(0, 256, (5, 7, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for x, y, radius, *colour in generator.integers(0, (*size, 30, 256, 256, 256), (8, 6)).tolist():
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colour))
    return image


def recompressed(image, quality=40):
    image.save(stream := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(stream)


COPIES = {
    "smaller": lambda image: image.resize((75, 50), Image.Resampling.LANCZOS),
    "larger": lambda image: image.resize((255, 172), Image.Resampling.BICUBIC),
    "another shape": lambda image: image.resize((90, 90), Image.Resampling.BICUBIC),
    "recompressed": recompressed,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "all of it": lambda image: recompressed(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((97, 65)), 70),
    "grey": lambda image: image.convert("L").convert("RGB"),
}


def hash_of(image):
    return perceptual_hash(np.asarray(image))


def distances(first, second):
    return np.unpackbits((first[:, None] ^ second)[..., None].view(np.uint8), axis=-1).sum(-1)


def test_the_bits_are_the_signs_of_scipys_dct():
    for seed in range(5):
        grey = picture(seed).convert("L").resize((32, 32), Image.Resampling.HAMMING)
        signs = dctn(np.asarray(grey, float))[:8, :8].ravel()[1:] > 0
        assert hash_of(picture(seed)) == sum(1 << place for place, sign in enumerate(signs.tolist()) if sign)
    assert hash_of(Image.new("RGB", (33, 47), (200, 7, 9))) == 0


def test_copies_are_near_and_other_pictures_are_not():
    pictures = [picture(seed) for seed in range(40)]
    hashes = [[hash_of(image) for image in pictures]]
    hashes += [[hash_of(copy(image)) for image in pictures] for copy in COPIES.values()]
    groups = group_duplicates(np.array(hashes).flatten()).reshape(len(hashes), 40)
    assert (groups == groups[0]).all() and len(np.unique(groups)) == 40


def test_groups_are_the_connected_components_of_all_distances():
    """Of clusters that chains join, and of hashes exactly at and beyond the distance, in any bits."""
    bits, generator = 6, np.random.default_rng(6)
    hashes = np.repeat(generator.integers(0, 2**63, 60), 10)
    for _ in range(bits):
        changed = np.int64(1) << generator.integers(0, 63, len(hashes))
        hashes = hashes ^ np.where(generator.random(len(hashes)) < 0.6, changed, 0)
    hashes = np.where(generator.random(len(hashes)) < 0.5, hashes, hashes ^ ODD)
    near = np.minimum(distances(hashes, hashes), distances(hashes, hashes ^ ODD)) <= 4
    count, wanted = connected_components(near)
    groups = group_duplicates(hashes)
    assert 60 < count < 600 and len(np.unique(groups)) == count
    assert all((groups[wanted == number] == hashes[wanted == number].min()).all() for number in range(count))


def test_prepare_fills_in_hash_and_group(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for seed in range(3):
        picture(seed).save(root / f"{seed}.png")
    COPIES["all of it"](picture(1)).save(root / "3.jpg")
    (root / "4.png").write_bytes(b"")
    prepare = ["job=manifest", "data=image_folder", f"data.root={root}", "data.validation_fraction=0.0"]
    run("prepare", prepare, tmp_path)
    plain = load(root, tmp_path / "cache").arrow
    run("prepare", [*prepare, "job.duplicates=true", "job.verify=false"], tmp_path)  # which decodes all the same
    collection = load(root, tmp_path / "cache")
    hashes, groups = (collection.table[name].to_pylist() for name in ("phash", "group"))
    assert hashes[:3] == [hash_of(picture(seed)) for seed in range(3)] and hashes[4] is None
    assert groups[1] == groups[3] and len({*groups}) == 4 and groups[4] is None
    assert Collection(str(root), plain).fingerprint == collection.fingerprint
