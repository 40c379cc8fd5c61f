"""Near-duplicates. Properties of drawn pictures: copies are found, in any order and mirrored, and other pictures are
not; `prepare.py job=manifest` fills in the groups."""

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageDraw, ImageEnhance, ImageFont, ImageOps

from data.collection.collection import Collection
from data.collection.duplicates import are_alike, draw_thumbnail, group_duplicates, read_thumbnails
from data.layouts.glyphs import draw_glyph, font_file
from tests.data.collection.test_collection import load
from tests.in_process import run

FLAGS = {
    "france": ("#0055A4", "white", "#EF4135"), "italy": ("#009246", "white", "#CE2B37"),
    "ireland": ("#169B62", "white", "#FF883E"), "peru": ("#D91023", "white", "#D91023"),
    "nigeria": ("#008751", "white", "#008751"), "guinea": ("#CE1126", "#FCD116", "#009460"),
    "mali": ("#14B53A", "#FCD116", "#CE1126"), "belgium": ("black", "#FDDA24", "#EF3340"),
    "romania": ("#002B7F", "#FCD116", "#CE1126"), "chad": ("#002664", "#FECB00", "#C60C30"),
}  # fmt: skip
SIZE = (150, 101)
FONT = ImageFont.truetype(str(font_file("DejaVuSans")), 44)


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
    "recompressed": recompressed,
    "mirrored": ImageOps.mirror,
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.88),
    "all of it": lambda image: recompressed(ImageOps.mirror(image).resize((97, 65)), 70),
}
CHANGED = ("recompressed", "darker", "all of it")  # a flat colour is another one
COLOURS = st.tuples(*[st.sampled_from([0, 85, 170, 255])] * 3)
DARK = st.sampled_from([(0, 0, 0), (170, 0, 0), (0, 0, 170), (0, 85, 0)])
SPOTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=6, unique=True)


def draw_bars(colours, is_high, how=Image.Resampling.NEAREST):
    """A flag, or a gradient."""
    pixels = np.array(colours, np.uint8)[None]
    return Image.fromarray(pixels.swapaxes(0, 1) if is_high else pixels).resize(SIZE, how)


def draw_sprite(spots, colour):
    image = Image.new("RGB", SIZE, "white")
    for x, y in spots:
        ImageDraw.Draw(image).ellipse((5 + 30 * x, 2 + 20 * y, 25 + 30 * x, 18 + 20 * y), fill=colour)
    return image


def draw_word(letters, colour):
    """A word on one background."""
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).text((75, 50), letters, colour, FONT, anchor="mm")
    return image


HOW = st.sampled_from([Image.Resampling.NEAREST, Image.Resampling.BILINEAR])
DRAWN = {
    draw_bars: st.tuples(st.lists(COLOURS, min_size=2, max_size=3), st.booleans(), HOW),
    draw_sprite: st.tuples(SPOTS, DARK),
    draw_word: st.tuples(st.sampled_from(["HAT", "BOX", "SUN", "LEAF", "KEY", "MILK", "ZOO", "FOX"]), DARK),
    picture: st.tuples(st.integers(0, 10_000)),
}


def thumbnails_of(*images):
    return read_thumbnails([draw_thumbnail(np.asarray(image.convert("RGB"))) for image in images])


def differ(first, second):
    """Return whether two pictures differ for an eye, also mirrored: in more than 2 % of the pixels, clearly."""
    one, other = (np.asarray(image.convert("RGB"), float) for image in (first, second))
    return all((abs(one - each).max(-1) > 40).mean() > 0.02 for each in (other, other[:, ::-1]))


@given(st.sampled_from(list(DRAWN)).flatmap(lambda draw: st.tuples(DRAWN[draw], DRAWN[draw], st.just(draw))))
@settings(max_examples=150, deadline=None)
def test_copies_are_found_and_pictures_of_one_kind_are_told_apart(drawn):
    *values, draw = drawn
    image, other = (draw(*each) for each in values)
    if differ(image, other):
        assert not are_alike(thumbnails_of(image), thumbnails_of(other))[0]
    spread = np.asarray(image.convert("L"), float).std()
    names = [name for name in COPIES if spread > 35 or name not in CHANGED]
    found = are_alike(thumbnails_of(image), thumbnails_of(*(COPIES[name](image) for name in names)))
    assert dict(zip(names, found)) == dict.fromkeys(names, True)


def test_groups_have_the_copies_of_many_pictures():
    """Flags, flat colours, letters and pictures, each with copies."""
    flags = [draw_bars([ImageColor.getrgb(colour) for colour in each], False) for each in FLAGS.values()]
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
