"""An eighth of the embedded collection: literal counts, properties of rows, drawn by two processes, refusals."""

import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import features

import data.layouts.glyphs as glyphs
from data.collection.collection import check_classes
from data.layouts.glyphs import draw_glyph, draw_glyphs, glyphs_ready, read_codes
from data.layouts.table import count_values
from tests.data.collection.test_collection import load
from tests.support import FORKS, read_image, refuses


def _draw_one_face(root, barrier):
    """Draw one small face from a process that starts together with another."""
    glyphs.TRAIN_FACES, glyphs.VAL_FACES = (), ("STIXGeneralBol",)
    barrier.wait()
    draw_glyphs(root)
    raise SystemExit(0 if glyphs_ready(root) else 1)


# Code points that tests name.
NAMED = {0x20, 0x27, 0x2C, 0x41, 0x5F, 0x305, 0x332, 0x391, 0x410, 0x531, 0x203E, 0xF6C5}


@pytest.fixture(scope="session")
def root():
    """Return the collection of every eighth code point, drawn into memory where there is room."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > 2**30
    with tempfile.TemporaryDirectory(prefix="atelier-test-", dir=memory if has_room else None) as folder:
        root = Path(folder) / "glyphs"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(glyphs, "read_codes", lambda face: [c for c in read_codes(face) if c % 8 == 1 or c in NAMED])
            draw_glyphs(root)
        yield root


@pytest.fixture(scope="session")
def collection(root, tmp_path_factory):
    return load(root, tmp_path_factory.mktemp("cache"), 0.5)


def row_of(collection, path):
    return collection.row(collection.table["path"].index(path).as_py())


def test_counts(collection):
    train, val = collection.rows("train"), collection.rows("val")
    names = check_classes(collection)
    ids = collection.class_ids(names)
    assert (len(collection), len(train), len(val)) == (7_117, 6_191, 926)
    assert len(names) == 137 and collection.class_names("val") == names
    assert ((ids[train] >= 0).sum(), (ids[val] >= 0).sum()) == (1_692, 482)
    both = count_values(collection.table["tags"])
    assert len(both) == 736 and sum(count >= 20 for count in both.values()) == 231
    paths = np.array(collection.table["path"].to_pylist())
    assert np.array_equal(np.flatnonzero(np.char.startswith(paths, "images/STIX")), val)  # never trained on
    assert {path.split("/")[1] for path in paths} == {*glyphs.TRAIN_FACES, *glyphs.VAL_FACES}


def test_a_row_and_its_file(collection, root):
    row = row_of(collection, "images/DejaVuSans/U+0041.png")
    assert row.label == "U+0041" and row.caption == "latin capital letter a" and row.rating is None
    assert row.tags == ("latin", "capital", "letter", "a") and row.weight == 1
    pixels = read_image(root / row.path, 1, 4096)
    assert pixels.shape == (64, 64, 1) and pixels.min() == 0 and (pixels[[0, -1]] == 255).all()
    nameless = row_of(collection, "images/DejaVuSans/U+F6C5.png")
    assert (nameless.caption, nameless.tags) == (None, ())
    assert row_of(collection, "images/DejaVuSans/U+0531.png").label is None  # of few faces
    assert draw_glyph("DejaVuSans", 0x20) is None and 0x20 in read_codes("DejaVuSans")  # blank
    assert collection.table["path"].index("images/DejaVuSans/U+0020.png").as_py() == -1


def test_characters_of_one_shape_are_one_class(collection):
    faces, codes = ("DejaVuSans", "DejaVuSerif-Italic", "STIXGeneral"), ("U+0041", "U+0391", "U+0410")
    labels = {row_of(collection, f"images/{face}/{code}.png").label for face in faces for code in codes}
    assert labels == {"U+0041"}
    # Centred by their ink, these pairs would look the same.
    for one, other in (("U+002C", "U+0027"), ("U+005F", "U+0332"), ("U+0305", "U+203E")):
        assert row_of(collection, f"images/DejaVuSans/{one}.png").label == one
        assert row_of(collection, f"images/DejaVuSans/{other}.png").label == other


def test_glyphs_larger_than_the_square_are_shrunk_and_none_is_cut():
    long_dash = np.array(draw_glyph("STIXGeneral", 0x2015))
    columns = np.flatnonzero((long_dash < 255).any(axis=0))
    assert columns[-1] - columns[0] + 1 > 60 and long_dash.min() < 128


@pytest.mark.skipif(features.version("freetype2") != "2.14.3", reason="another FreeType draws other pixels")
def test_the_pixels_are_those_that_were_measured(root):
    """With matplotlib 3.11.2; every second image. The bytes of a file depend on Pillow's encoder too."""
    digest = hashlib.sha256()
    for file in sorted(root.glob("images/*/*.png"))[::2]:
        digest.update(f"{file.relative_to(root)}".encode() + read_image(file, 1, 4096).tobytes())
    assert digest.hexdigest() == "992d6c3b0835bde6efb45c2c7020f17a3ea7d02716de705aaaa3ed8df2fffe1e"


def test_two_processes_at_once_make_it_once(tmp_path):
    barrier = FORKS.Barrier(2)
    root = tmp_path / "sub" / "glyphs"
    processes = [FORKS.Process(target=_draw_one_face, args=(root, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0] and list(root.parent.iterdir()) == [root]


def test_an_interrupted_drawing_leaves_no_collection_and_a_second_call_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "TRAIN_FACES", ())
    monkeypatch.setattr(glyphs, "VAL_FACES", ("STIXGeneralBol",))
    monkeypatch.setattr(glyphs, "read_codes", lambda face: list(range(0x41, 0x5B)))
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(glyphs, "save_manifest", lambda *_: 1 / 0)
        draw_glyphs(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    draw_glyphs(tmp_path / "new")
    assert glyphs_ready(tmp_path / "new")
    table = pq.read_table(tmp_path / "new" / "manifest.parquet")
    assert table.num_rows == 26 and table["split"].unique().to_pylist() == ["val"]
    monkeypatch.setattr(glyphs, "_draw_into", None)
    draw_glyphs(tmp_path / "new")


@pytest.mark.parametrize("kind", ["images", "file"])
def test_something_else_at_the_root_is_refused(tmp_path, kind):
    root = tmp_path / "photos"
    if kind == "file":
        root.write_text("")
    else:
        root.mkdir()
        (root / "manifest.parquet").write_bytes(b"")
        (root / "a.png").write_text("")
    with refuses(r"^data\.root: .*photos' does not hold .*data=image_folder"):
        draw_glyphs(root)
