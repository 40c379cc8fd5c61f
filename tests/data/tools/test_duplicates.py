"""Near-duplicates: copies of drawn pictures are found, in any order and mirrored, and other pictures are not;
`prepare.py job=manifest` fills in the groups."""

import io

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageEnhance, ImageOps

from data.collection.collection import Collection
from data.collection.duplicates import are_alike, draw_thumbnail, group_duplicates, read_thumbnails
from data.layouts.glyphs import draw_glyph
from tests.data.collection.test_collection import load
from tests.in_process import run

# France, Italy, Ireland, Peru, Nigeria, Guinea, Mali, Belgium, Romania, Chad
FLAGS = """
#0055A4 white #EF4135
#009246 white #CE2B37
#169B62 white #FF883E
#D91023 white #D91023
#008751 white #008751
#CE1126 #FCD116 #009460
#14B53A #FCD116 #CE1126
black #FDDA24 #EF3340
#002B7F #FCD116 #CE1126
#002664 #FECB00 #C60C30
"""
SIZE = (150, 101)


def picture(seed, size=SIZE):
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
    "another shape": lambda image: image.resize((190, 172), Image.Resampling.BICUBIC),
    "mirrored": ImageOps.mirror,
    "all of it": lambda image: recompressed(ImageOps.mirror(image).resize((97, 65)), 70),
}


def thumbnails_of(*images):
    return read_thumbnails([draw_thumbnail(np.asarray(image.convert("RGB"))) for image in images])


def test_groups_have_the_copies_of_many_pictures():
    """Flags, flat colours, letters and pictures, each with copies."""
    rows = [[ImageColor.getrgb(colour) for colour in line.split()] for line in FLAGS.strip().splitlines()]
    flags = [Image.fromarray(np.array([row], np.uint8)).resize(SIZE, Image.Resampling.NEAREST) for row in rows]
    colours = [Image.new("RGB", SIZE, (level, 255 - level, 90)) for level in range(0, 256, 16)]
    letters = [draw_glyph("DejaVuSerif", ord(letter)) for letter in "ABDEGHKMNRSTWXYZabdeghkmnrtwxyz&%#"]
    pictures = [*flags, *colours, *letters, *map(picture, range(40))]
    copies = [COPIES[name](image) for name in ("smaller", "mirrored", "another shape") for image in pictures]
    texts = [draw_thumbnail(np.asarray(image.convert("RGB"))) for image in (*pictures, *copies)]
    order = np.random.default_rng(0).permutation(len(texts))
    groups = group_duplicates([texts[number] for number in order])
    _, first = np.unique(order % len(pictures), return_index=True)
    assert (groups == first[order % len(pictures)]).all()
    assert not are_alike(thumbnails_of(pictures[0]), thumbnails_of(pictures[0].convert("L")))[0]  # grey is another
    soft = [image.point(lambda level: 30 + 0.7 * level) for image in pictures[-40:]]
    assert are_alike(thumbnails_of(*soft), thumbnails_of(*map(COPIES["all of it"], soft))).all()
    for factor in (0.85, 0.9, 1.1, 1.15):
        lit = [ImageEnhance.Brightness(image).enhance(factor) for image in soft]
        assert are_alike(thumbnails_of(*soft), thumbnails_of(*lit)).all()
    assert group_duplicates([]).tolist() == [] and group_duplicates(texts[:1]).tolist() == [0]


def test_prepare_fills_in_groups(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for seed in range(3):
        picture(seed).save(root / f"{seed}.png")
    COPIES["all of it"](picture(1)).save(root / "3.jpg")
    prepare = ["job=manifest", "data=image_folder", f"data.root={root}", "data.validation_fraction=0.0"]
    run("prepare", [*prepare, "job.verify=false"], tmp_path)
    plain = load(root, tmp_path / "cache").arrow
    run("prepare", prepare, tmp_path)
    assert Collection(str(root), plain).fingerprint == load(root, tmp_path / "cache").fingerprint
    (root / "4.png").write_bytes(b"")
    run("prepare", prepare, tmp_path)
    collection = load(root, tmp_path / "cache")
    groups = collection.table["group"].to_pylist()
    assert groups == [None, 0, None, 0, None]
