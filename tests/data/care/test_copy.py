"""job=copy. Literal sets of files; run again it copies nothing; refusals."""

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.in_process import run
from utils.errors import UserError

COPY = ["job=copy", "data=image_folder", "data.root=images", "data.validation_fraction=0.0", "job.to=part"]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    for name, tags in (("x/a", "red hair, hat"), ("x/b", "hat"), ("y/c", "red_hair")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9 if name == "x/a" else 5)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(tags)
    return folder


def copied(tmp_path):
    return sorted(p.relative_to(tmp_path / "part").as_posix() for p in (tmp_path / "part").rglob("*") if p.is_file())


def test_a_part_by_tags_rules_and_list(root, tmp_path):
    assert "2 of 3 images" in run("prepare", [*COPY, "job.tags=[red hair]"], tmp_path)
    assert copied(tmp_path) == ["x/a.png", "x/a.txt", "y/c.png", "y/c.txt"]
    assert (tmp_path / "part/x/a.png").read_bytes() == (root / "x/a.png").read_bytes()
    assert run("prepare", [*COPY, "job.tags=[red hair]"], tmp_path).endswith("0 of 4 files copied now")
    (tmp_path / "list.txt").write_text("x/b.png\n\n x/a.png\n")
    line = run("prepare", [*COPY, "job.to=other", "job.listed=list.txt", "job.min_side_px=9"], tmp_path)
    assert line.startswith("1 of 3 images") and (tmp_path / "other/x/a.txt").is_file()


def test_the_rows_of_a_manifest_go_with_the_images(root, tmp_path):
    run("prepare", ["job=manifest", *COPY[1:-1]], tmp_path)
    run("prepare", [*COPY, "job.tags=[hat]"], tmp_path)
    assert pq.read_table(tmp_path / "part/manifest.parquet")["path"].to_pylist() == ["x/a.png", "x/b.png"]


def test_what_is_refused(root, tmp_path):
    for to, message in (("images/part", r"^job.to: .*inside data.root"),):
        with pytest.raises(UserError, match=message):
            run("prepare", [*COPY[:-1], f"job.to={to}"], tmp_path)
    (tmp_path / "list.txt").write_text("x/b.png\nx/none.png")
    for file, message in (
        ("none.txt", r"^job.listed: .* is no file"),
        ("list.txt", r"^job.listed: 1 .*none.png"),
    ):
        with pytest.raises(UserError, match=message):
            run("prepare", [*COPY, f"job.listed={file}"], tmp_path)
    run("prepare", COPY, tmp_path)
    (tmp_path / "part/x/a.png").write_text("another")
    with pytest.raises(UserError, match=r"^job.to: .*is another file"):
        run("prepare", COPY, tmp_path)
