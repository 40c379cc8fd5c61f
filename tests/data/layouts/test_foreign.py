"""Other people's shards: WebDataset's tar files, and Arrow and Parquet files of Hugging Face's `datasets`."""

import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.images.bytes import open_contents
from data.open import open_images
from tests.data.collection.test_collection import columns, put
from tests.data.collection.test_collection import load as load_into
from tests.data.layouts.test_manifest import write_rows
from tests.support import data_config, encoded, placed, refuses


def png(level):
    return encoded(Image.new("L", (5, 4), level), "PNG")


def write_tar(file, members, format=tarfile.GNU_FORMAT):
    """Write members: by name a content, or as a text the type of a member without one."""
    with tarfile.open(placed(file), "w", format=format) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content.encode(), "x.png"
                tar.addfile(member)


@pytest.fixture
def load(tmp_path):
    return lambda root=tmp_path / "root": load_into(root, tmp_path / "cache")


def record(**columns):
    return json.dumps(columns).encode()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_give_images_and_what_is_beside_them(format, tmp_path, load):
    deep = "d/" * 60 + "猫.png"  # longer than an old header holds
    train = {
        "./a.png": png(1),
        "a.cls": b"3\n",
        "b.PNG": png(2),
        "b.txt": b"one, two",
        "b.json": record(label="dog", rating="general"),
        "b.seg.png": png(3),
        "readme.md": b"no image",
        "d": tarfile.DIRTYPE.decode(),
    }
    if format != tarfile.USTAR_FORMAT:
        train[deep] = png(4)
    write_tar(tmp_path / "root/train-0.tar", train, format)
    write_tar(tmp_path / "root/val/0.tar", {"a.png": png(9), "a.json": record(caption="A cat.", tags=["cat"])}, format)
    found = load()
    rows = columns(found, "path", "split", "label", "tags", "rating", "caption")
    assert [row for row in rows if row[0] != f"train-0.tar/{deep}"] == [
        ("train-0.tar/a.png", "train", "3", [], None, None),
        ("train-0.tar/b.PNG", "train", "dog", ["one", "two"], "general", "one, two"),
        ("val/0.tar/a.png", "val", None, ["cat"], None, "A cat."),
    ]
    contents = open_contents(found)
    levels = [Image.open(io.BytesIO(contents.read(row))).getpixel((0, 0)) for row in range(len(found))]
    assert sorted(levels) == [1, 2, 9] if format == tarfile.USTAR_FORMAT else [1, 2, 4, 9]


def test_dangerous_members_are_skipped_and_named(tmp_path, load, log):
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
    bad = {"../x.png": png(1), "/etc/x.png": png(1)} | {f"{name}.png": kind.decode() for name, kind in kinds.items()}
    write_tar(tmp_path / "root/0.tar", bad | {"good.png": png(7), "good.json": b"{", "bad.json": b"{}"})
    found = load()
    assert [found.row(0).path, len(found)] == ["0.tar/good.png", 1]
    load()  # by its index
    assert (
        log.text.count("6 members of shards") == 2
        and "../x.png" in log.text
        and "'0.tar/good.json' is broken JSON" in log.text
    )
    write_tar(tmp_path / "other/0.tar", bad)
    with refuses(r"^data\.root: .*holds no image in 0\.tar; .*\.\./x\.png"):
        load(tmp_path / "other")


def stated(size, kind=tarfile.REGTYPE):
    """Return a valid header of a member that states a size."""
    member = tarfile.TarInfo("4.png")
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "place, content, count, words",
    [
        (4 * 1024 + 5, b"x", 4, "from byte 4,096 of"),
        (4 * 1024, bytes(1024), 4, "from byte 4,096 of 10,240 (its end is followed by more)"),
        (4 * 1024, stated(-1), 4, "from byte 4,096 of"),
        (4 * 1024, stated(2**60), 4, "from byte 4,096 of"),
        (4 * 1024, stated(70, tarfile.GNUTYPE_SPARSE), 8, "1 members of shards that are no plain files"),
        (9 * 1024, None, 9, "from byte 9,216 of 9,216 (the mark of its end is missing)"),
        (8 * 1024 + 100, None, 8, "from byte 8,192 of"),
    ],
)
def test_a_tar_file_that_is_read_in_part_says_where_it_stops(place, content, count, words, tmp_path, load, log):
    write_tar(tmp_path / "root/0.tar", {f"{number}.png": png(number) for number in range(9)})
    with open(tmp_path / "root/0.tar", "r+b") as file:
        file.seek(place)
        file.truncate() if content is None else file.write(content)
    assert len(load()) == count and words in log.text


def test_the_ending_of_a_member_follows_its_last_dot(tmp_path, load, log):
    members = {
        "22.05.jpg": png(1),
        "22.05.txt": b"own",
        "22.06.JPG": png(2),
        "22.06.cls": b"1",
        "22.txt": b"of the key",
    }
    members |= {"x.left.png": png(3), "x.right.png": png(4), "x.cls": b"2", "y.png": png(5), "y.seg.png": png(6)}
    write_tar(tmp_path / "root/0.tar", members)
    found = load()
    assert columns(found, "path", "label", "caption") == [
        ("0.tar/22.05.jpg", None, "own"),
        ("0.tar/22.06.JPG", "1", None),
        ("0.tar/x.left.png", "2", None),
        ("0.tar/x.right.png", "2", None),
        ("0.tar/y.png", None, None),
    ]
    assert "1 further images of a sample: 0.tar/y.seg.png" in log.text
    assert "1 texts in shards without an image: 0.tar/22.txt" in log.text


def test_folders_in_a_tar_file_are_classes_unless_texts_describe_the_images(tmp_path, load, log):
    members = {"train/cat/0.png": png(1), "train/dog/1.png": png(2), "val/cat/2.png": png(3), "val/._a.png": b"x"}
    write_tar(tmp_path / "root/0.tar", members | {"val/cat/2-masklabel.png": png(4)})
    found = load()
    assert columns(found, "split", "label") == [("train", "cat"), ("train", "dog"), ("val", "cat")]
    assert "2 masks, hidden names and thumbnails in shards: 0.tar/val/._a.png" in log.text
    write_tar(tmp_path / "two/0.tar", {"cat/0.png": png(1), "cat/0.txt": b"x", "cat/0.caption": b"A cat sits."})
    assert columns(load(tmp_path / "two"), "label", "tags", "caption") == [(None, ["x"], "A cat sits.")]
    assert "1 folders in shards with texts, which are no classes: 0.tar/cat" in log.text


def test_the_output_of_img2dataset_is_read(tmp_path, load, log):
    write_tar(tmp_path / "root/00000.tar", {"0.jpg": png(1), "0.json": record(caption="a", sha256="0")})
    write_parquet(tmp_path / "root/00000.parquet", pa.table({"key": ["0"], "url": ["x"]}))
    (tmp_path / "root/00000_stats.json").write_text("{}")
    assert load().row(0).caption == "a"
    assert "1 tables beside tar files: 00000.parquet" in log.text and "00000_stats" in log.text


def test_shards_are_scanned_again_only_where_a_file_changes(tmp_path, load, monkeypatch):
    for number in range(9):  # enough for processes
        write_tar(tmp_path / f"root/{number}.tar", {"a.png": png(number)})
    before = load()
    with monkeypatch.context() as patch:
        patch.setattr("data.layouts.shards.read_shards", lambda *_: pytest.fail("scanned again"))
        again = load()
    assert again.fingerprint == before.fingerprint
    assert [open_contents(again).read(row) for row in range(9)] == [png(number) for number in range(9)]
    write_tar(tmp_path / "root/0.tar", {"a.png": png(1), "b.png": png(2)})
    assert len(load()) == 10


def test_a_folder_with_images_is_read_as_it_was(tmp_path, load):
    write_tar(tmp_path / "root/backup.tar", {"a.png": png(1)})
    (tmp_path / "root/cat").mkdir()
    (tmp_path / "root/cat/x.png").write_bytes(png(2))
    assert load().row(0).path == "cat/x.png"


# ---------------------------------------------------------------------------------------------- Hugging Face datasets


def arrow_table(levels, kind="binary"):
    """Return a table as `datasets` writes it: images, their classes, captions and tags."""
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    features["tags"] = {"feature": {"names": ["a", "b"], "_type": "ClassLabel"}, "_type": "Sequence"}
    images = [None if level is None else {"bytes": png(level), "path": f"{level}.PNG"} for level in levels]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", getattr(pa, kind)()), ("path", pa.string())])),
            "label": pa.array([number % 3 - 1 for number in range(len(levels))]),
            "text": [f"picture {number}" for number in range(len(levels))],
            "tags": [[0, 1]] * len(levels),
        }
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_stream(file, table, **options):
    with pa.OSFile(str(placed(file)), "wb") as sink, pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=3)


def write_parquet(file, table):
    pq.write_table(table, placed(file), row_group_size=4, compression="snappy")


NAMED = "1 columns of unknown name, or second of their kind (data.columns={label: NAME} reads one): "


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_the_tables_of_imagefolder_are_read(form, tmp_path, load, log):
    """As `datasets` and diffusers' examples have them: in any folder, with paths below it."""
    root = put(tmp_path / "root", "train/c/0.png", "train/x/1.png", "train/c/2.png", "val/c/0.png")
    (root / "train/c/0.txt").write_text("a, b")
    rows = {"file_name": ["c/0.png", "x\\1.png", "gone.png"], "text": ["one", "two", "three"], "label": ["A", "B", "A"]}
    rows["score"] = [0.5, 1.5, 2]
    write_rows(root / f"train/metadata.{form}", rows)
    found = load(root)
    assert columns(found, "path", "label", "caption", "tags") == [
        ("train/c/0.png", "A", "one", ["a", "b"]),
        ("train/c/2.png", "c", None, []),
        ("train/x/1.png", "B", "two", []),
        ("val/c/0.png", "c", None, []),
    ]
    assert f"1 rows of tables without an image: gone.png in train/metadata.{form}" in log.text
    assert NAMED + "score" in log.text
    write_rows(root / "train" / ("metadata.csv" if form == "jsonl" else "metadata.jsonl"), rows)
    load(root)
    assert "/root/train' holds both metadata." in log.text


@pytest.mark.parametrize(
    "write, train, test",
    [
        (write_stream, "train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"),
        (write_parquet, "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    ],
)
@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_folders_of_datasets_are_read(write, train, test, kind, tmp_path, load, log):
    write(tmp_path / "root" / train, arrow_table([1, 2, None, 4, 5, 6, 7], kind))
    write(tmp_path / "root" / test, arrow_table([20, 21], kind))
    found = load()
    assert [found.row(row).path for row in found.rows("train")] == [f"{train}/{n:08}.png" for n in (0, 1, 3, 4, 5, 6)]
    assert len(found.rows("test")) == 2 and "1 rows without image bytes" in log.text
    rows = [found.row(int(row)) for row in found.rows("train")]
    assert [row.label for row in rows] == [None, "cat", None, "cat", "dog", None]
    assert (rows[2].caption, rows[2].tags) == ("picture 3", ("a", "b"))
    contents = open_contents(found)
    assert [contents.read(int(row)) for row in found.rows("train")] == [png(n) for n in (1, 2, 4, 5, 6, 7)]
    images = open_images(found, data_config(max_pixels=100), {"channels": 1})
    assert images.read(int(found.rows("test")[1]))["image"].unique().tolist() == [21]


def test_what_is_no_data_set_of_images_is_refused(tmp_path, load):
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    write_stream(tmp_path / "compressed/0.arrow", arrow_table([1] * 50), options=options)
    write_stream(tmp_path / "text/0.arrow", pa.table({"text": ["a"]}))
    write_stream(tmp_path / "cut/0.arrow", arrow_table(range(50)))
    os.truncate(tmp_path / "cut/0.arrow", 3000)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/0.parquet").write_bytes(b"PAR1")
    for name in ("compressed", "text", "cut", "none"):
        with refuses(r"^data\.root: .*0\.(arrow|parquet)"):
            load(tmp_path / name)


def test_an_unpacked_file_that_is_gone_is_made_again(tmp_path, load):
    write_parquet(tmp_path / "root/train.parquet", arrow_table([1, 2]))
    load()
    for file in (tmp_path / "cache/unpacked").iterdir():
        file.unlink()
    assert open_contents(load()).read(0) == png(1)
