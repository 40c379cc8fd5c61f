"""The embedded collection. Literal counts, properties of every row, drawn once by two processes, refusals."""

import hashlib
import json
import multiprocessing
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.glyphs as glyphs
from data.collection import check_classes, index_collection, open_collection
from data.glyphs import (
    describe_code,
    draw_glyph,
    draw_glyphs,
    encode_png,
    font_file,
    glyphs_ready,
    name_code,
    read_codes,
)
from tests.support import read_image


def _draw_and_count(root, barrier):
    """Draw from a process that starts together with another; exit with how often the drawing itself ran."""
    drawn, draw_into = [], glyphs._draw_into

    def counting(*arguments):
        drawn.append(arguments)
        draw_into(*arguments)

    glyphs._draw_into = counting
    barrier.wait()
    draw_glyphs(root)
    raise SystemExit(10 + len(drawn) if glyphs_ready(root) else 1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return a folder for 164,000 files: in memory where there is room, for some disks take minutes to delete them."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 2 * 2**30:
        yield tmp_path_factory.mktemp("glyphs")
        return
    folder = Path(tempfile.mkdtemp(prefix="atelier-test-", dir=memory))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def drawing(folder):
    """Draw from two processes at once, beside the half-made folder of a dead one; return root and exit statuses."""
    root = folder / "sub" / "glyphs"
    half_made = root.with_name(".glyphs.partial") / "images"
    half_made.mkdir(parents=True)
    (half_made / "U+0041.png").write_bytes(b"half")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_draw_and_count, args=(root, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return root, [process.exitcode for process in processes]


@pytest.fixture(scope="session")
def root(drawing):
    return drawing[0]


@pytest.fixture(scope="session")
def collection(root, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    collection = open_collection(str(root), index_collection(str(root), validation_fraction=0.5, cache=cache))
    assert list(cache.glob("*.arrow")) == [collection.arrow]
    return collection


def test_two_processes_draw_once(drawing):
    root, statuses = drawing
    assert sorted(statuses) == [10, 11]
    assert sorted(path.name for path in root.parent.iterdir()) == ["glyphs", "glyphs.lock"]


def test_counts(collection):
    train, val = collection.rows("train"), collection.rows("val")
    names = check_classes(collection, allow_missing=False)
    ids = collection.class_ids(names)
    assert (len(collection), len(train), len(val)) == (54_653, 47_495, 7_158)
    assert len(names) == 958 and collection.class_names("val") == names
    assert ((ids[train] >= 0).sum(), (ids[val] >= 0).sum()) == (12_298, 3_509)
    both = Counter(collection.tag_counts("train")) + Counter(collection.tag_counts("val"))
    assert len(both) == 2_120 and sum(count >= 20 for count in both.values()) == 712


def test_stix_is_never_trained_on(collection):
    paths = np.array(collection.table["path"].to_pylist())
    stix = np.char.startswith(paths, "images/STIX")
    assert np.array_equal(np.flatnonzero(stix), collection.rows("val"))
    assert np.char.startswith(paths[~stix], "images/DejaVu").all()
    faces = {path.split("/")[1] for path in paths}
    assert faces == {*glyphs.TRAIN_FACES, *glyphs.VAL_FACES} and len(faces) == 16


def row_of(collection, path):
    return collection.row(collection.table["path"].index(path).as_py())


def test_a_row_and_its_files(collection, root):
    row = row_of(collection, "images/DejaVuSans/U+0041.png")
    assert row.label == "U+0041" and row.caption == "latin capital letter a" and row.rating is None
    assert row.tags == ("latin", "capital", "letter", "a") and row.weight == 1
    stem = root / "images" / "DejaVuSans" / "U+0041"
    assert stem.with_suffix(".txt").read_text() == "latin capital letter a"
    assert json.loads(stem.with_suffix(".json").read_text()) == {
        "tags": ["latin", "capital", "letter", "a"],
        "caption": "latin capital letter a",
        "face": "DejaVuSans",
        "char": "A",
    }
    pixels = read_image(stem.with_suffix(".png"), 1, 4096)
    assert pixels.shape == (64, 64, 1) and pixels.min() == 0 and (pixels[[0, -1]] == 255).all()


def test_characters_of_one_shape_are_one_class(collection):
    faces, codes = ("DejaVuSans", "DejaVuSerif-Italic", "STIXGeneral"), ("U+0041", "U+0391", "U+0410")
    labels = {row_of(collection, f"images/{face}/{code}.png").label for face in faces for code in codes}
    assert labels == {"U+0041"}
    # Centred by their ink, these pairs would look the same.
    for one, other in (("U+002C", "U+0027"), ("U+005F", "U+0332"), ("U+0305", "U+203E")):
        assert row_of(collection, f"images/DejaVuSans/{one}.png").label == one
        assert row_of(collection, f"images/DejaVuSans/{other}.png").label == other


def test_characters_of_few_faces_have_no_class(collection):
    row = row_of(collection, "images/DejaVuSans/U+0531.png")
    assert row.label is None and row.caption == "armenian capital letter ayb"


def test_blank_glyphs_are_ignored(collection):
    assert draw_glyph("DejaVuSans", 0x20) is None and 0x20 in read_codes("DejaVuSans")
    assert collection.table["path"].index("images/DejaVuSans/U+0020.png").as_py() == -1


def test_nameless_glyphs_have_no_caption(collection, root):
    row = row_of(collection, "images/DejaVuSans/U+F6C5.png")
    assert (row.caption, row.tags) == (None, ()) and not (root / "images/DejaVuSans/U+F6C5.txt").exists()


def test_words_of_a_name():
    assert describe_code(0x2212) == ("minus sign", ["minus", "sign"])
    assert describe_code(0x2A7E)[0] == "greater-than or slanted equal to"
    assert describe_code(0x2A7E)[1] == ["greater", "than", "or", "slanted", "equal", "to"]
    assert describe_code(0x2AA0)[1] == ["similar", "above", "greater", "than", "equals", "sign"]


def test_glyphs_larger_than_the_square_are_shrunk_and_none_is_cut():
    long_dash = np.array(draw_glyph("STIXGeneral", 0x2015))
    columns = np.flatnonzero((long_dash < 255).any(axis=0))
    assert columns[-1] - columns[0] + 1 > 60 and long_dash.min() < 128


def test_a_face_drawn_again_gives_the_same_bytes(collection, root):
    face = "DejaVuSerif-Italic"
    paths = collection.table["path"].to_pylist()
    sums = dict(zip(paths, collection.table["sha256"].to_pylist()))
    sizes = dict(zip(paths, collection.table["size"].to_pylist()))
    count = 0
    for code in read_codes(face):
        image = draw_glyph(face, code)
        if image is not None:
            path, png = f"images/{face}/{name_code(code)}.png", encode_png(image.tobytes(), 64)
            assert (root / path).read_bytes() == png
            assert (sums[path], sizes[path]) == (hashlib.sha256(png).hexdigest(), len(png))
            count += 1
    assert count == sum(path.startswith(f"images/{face}/") for path in paths) > 3000


def test_pillow_reads_what_encode_png_writes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8)
    (tmp_path / "x.png").write_bytes(encode_png(pixels.tobytes(), 9))
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "L" and np.array_equal(np.array(image), pixels)


def test_the_pixels_are_those_that_were_measured(root):
    about = json.loads((root / "glyphs.json").read_text())
    assert about["version"] == glyphs.GLYPHS_VERSION and about["count"] == 54_653
    assert about["measured"] == glyphs.MEASURED
    if about["freetype"] != glyphs.MEASURED["freetype"]:
        pytest.skip(f"FreeType {about['freetype']} draws other pixels")
    assert about["pixels"] == glyphs.MEASURED["pixels"]


def test_a_second_call_does_nothing(root, monkeypatch):
    before = (root / "glyphs.json").stat().st_mtime_ns
    monkeypatch.setattr(glyphs, "_draw_into", None)
    draw_glyphs(root)
    assert (root / "glyphs.json").stat().st_mtime_ns == before


@pytest.fixture
def one_face(monkeypatch):
    """Draw one small face only."""
    monkeypatch.setattr(glyphs, "TRAIN_FACES", ())
    monkeypatch.setattr(glyphs, "VAL_FACES", ("STIXGeneralBol",))
    monkeypatch.setattr(glyphs, "read_codes", lambda face: list(range(0x41, 0x5B)))


def test_progress_and_an_empty_folder(one_face, tmp_path):
    (tmp_path / "new").mkdir()
    calls = []
    draw_glyphs(tmp_path / "new", lambda done, total: calls.append((done, total)))
    assert glyphs_ready(tmp_path / "new") and calls == [(26, 26)]
    table = pq.read_table(tmp_path / "new" / "manifest.parquet")
    assert table.num_rows == 26 and table["split"].unique().to_pylist() == ["val"]


def test_an_interrupted_drawing_leaves_no_collection(one_face, tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "save_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw_glyphs(tmp_path / "new")
    assert not glyphs_ready(tmp_path / "new") and not (tmp_path / "new").exists()
    monkeypatch.undo()
    monkeypatch.setattr(glyphs, "TRAIN_FACES", ())
    monkeypatch.setattr(glyphs, "VAL_FACES", ("STIXGeneralBol",))
    draw_glyphs(tmp_path / "new")
    assert glyphs_ready(tmp_path / "new")


@pytest.mark.parametrize("kind", ["images", "file", "other version"])
def test_something_else_at_the_root_is_refused(tmp_path, kind):
    root = tmp_path / "photos"
    if kind == "file":
        root.write_text("")
    else:
        root.mkdir()
        (root / "manifest.parquet").write_bytes(b"")
        (root / ("glyphs.json" if kind == "other version" else "a.png")).write_text('{"version": 0}')
    with pytest.raises(ValueError, match=r"^data\.root: .*photos' exists and does not hold version 1 of the embedded"):
        draw_glyphs(root)


def test_a_root_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^data\.root: .*/file/glyphs cannot be written"):
        draw_glyphs(tmp_path / "file" / "glyphs")


def test_all_faces_are_there():
    assert len({*glyphs.TRAIN_FACES, *glyphs.VAL_FACES}) == 16
    assert all(font_file(face).is_file() for face in (*glyphs.TRAIN_FACES, *glyphs.VAL_FACES))
