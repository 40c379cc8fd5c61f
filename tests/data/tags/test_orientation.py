"""What a mirror does to tags: tables of pairs, drops and forbidden mirrors by mode; bad maps are refused with the file
and the entry. On the device, the coin is the key's; that nothing waits for the host: engine/test_fake_cuda.py."""

import json

import pytest
import torch

from data.layouts.glyphs import TRAIN_FACES, describe_code, read_codes
from data.tags.orientation import Mirror, build_orientation
from tests.support import refuses
from utils.errors import UserError
from utils.formats.vocabulary import Vocabulary

BOORU = {  # name: category
    "1girl": 0, "left-handed": 0, "right-handed": 0, "right-over-left_kimono": 0, "english_text": 0, "signature": 0,
    "bright_pupils": 0, "leftovers": 0, "left_4_dead": 3, "left-handed_(artist)": 1, "general": 9,
}  # fmt: skip


def vocabulary_of(tags):
    return Vocabulary.of((category, name) for name, category in tags.items())


def build(tags, name="booru"):
    """Return pairs, drops and forbidden mirrors, by name."""
    found, names = build_orientation(vocabulary_of(tags), str(name)), list(tags)
    assert json.loads(json.dumps(found)) == found
    pairs = {frozenset(names[output] for output in pair) for pair in found["pairs"]}
    return pairs, *({names[output] for output in found[what]} for what in ("dropped", "no_flip"))


def write(folder, text):
    path = folder / "map.yaml"
    path.write_text(text)
    return path


def test_booru_tags_pair_drop_and_forbid():
    pairs, dropped, no_flip = build(BOORU)
    assert pairs == {frozenset({"left-handed", "right-handed"})} and dropped == {"right-over-left_kimono"}
    assert no_flip == {"english_text", "signature"}


def test_a_tag_without_its_mirror_image_is_dropped(tmp_path):
    text = "never_flip: [b]\nsymmetric: [left_c*]\npatterns: [{match: '^(left|right)', swap: [left, right]}]"
    tags = dict.fromkeys(["left_a", "b", "left_cd", "left_e", "right_e"], 0)
    assert build(tags, write(tmp_path, text)) == ({frozenset({"left_e", "right_e"})}, {"left_a"}, {"b"})


def test_pairs_come_before_patterns_and_hold_in_every_category(tmp_path):
    path = write(tmp_path, "pairs: [[left_a, port], [x, y]]\npatterns: [{match: .*, swap: [left, right]}]")
    tags = {"left_a": 0, "port": 0, "left_right_b": 0, "right_left_b": 0, "x": 4, "y": 4, "left": 4, "right": 4}
    assert build(tags, path)[0] == {
        frozenset(two) for two in (("left_a", "port"), ("left_right_b", "right_left_b"), "xy")
    }


def test_words_of_glyphs_swap_and_letters_stay():
    words = {word for code in read_codes(TRAIN_FACES[0]) for word in describe_code(code)[1]}
    pairs, _, no_flip = build(dict.fromkeys(sorted(words), 0), "glyphs")
    wanted = [("left", "right"), ("leftwards", "rightwards"), ("east", "west"), ("less", "greater")]
    assert {frozenset(two) for two in wanted} <= pairs
    assert {"letter", "digit", "braille"} <= no_flip
    assert all("right" not in pair and "copyright" not in pair for pair in pairs - {frozenset(wanted[0])})


@pytest.mark.parametrize(
    "text, entry",
    [
        ("pattern: []", "pattern: "),
        ("patterns: [{match: '(left', swap: [left, right]}]", "patterns.0.match: "),
        ("pairs: [[a, b], [b, c]]", "'a' becomes 'b', then 'c'"),
        ("pairs: [", "is not a readable orientation map"),
        ("pairz: []", "pairz: unknown key; close: pairs"),
    ],
)  # fmt: skip
def test_a_bad_map_is_refused_with_file_and_entry(text, entry, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as refused:
        build({"left": 0, "a": 0}, path)
    assert str(refused.value).startswith(f"task.orientation: {path}") and entry in str(refused.value)
    with refuses(r"^task.orientation: nowhere is not a readable"):
        build({"left": 0}, "nowhere")


# ------------------------------------------------------------------------------------------------------- on the device


def batch(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 4, 6), generator=generator, dtype=torch.uint8)
    targets = (torch.rand(count, len(BOORU), generator=generator) < 0.4).float()
    return images, targets, torch.randint(0, 2**62, (count,), generator=generator)


def test_the_coin_is_the_keys_and_writing_forbids_it():
    """However a batch is split."""
    images, targets, keys = batch(600)
    mirror = Mirror(build_orientation(vocabulary_of(BOORU), "booru"), len(BOORU))
    turned, tags = mirror(images, targets, keys)
    mirrored = (turned == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(turned[~mirrored], images[~mirrored])
    wanted = targets.clone()
    wanted[:, [1, 2]] = targets[:, [2, 1]]
    wanted[:, list(BOORU).index("right-over-left_kimono")] = 0
    assert torch.equal(tags, torch.where(mirrored[:, None], wanted, targets))
    writing = targets[:, [4, 5]].any(1)
    assert not mirrored[writing].any() and 0.4 < mirrored[~writing].float().mean() < 0.6
    assert torch.equal(mirror(images[7:9], targets[7:9], keys[7:9])[0], turned[7:9]) and mirror.state_dict() == {}
