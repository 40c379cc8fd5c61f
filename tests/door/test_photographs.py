"""docs/photographs.md on the folders of a phone: every photograph is read, and the rest is one line."""

import subprocess
import unicodedata

import numpy as np
import pytest
from PIL import Image

from data.images.further import load_package
from tests.door.follow import follow
from tests.in_process import SHORT
from tests.support import contents, read_table, turned

KINDS = {"Hunde": (180, 60, 40), "Katzen": (40, 150, 60), "Möwen": (50, 60, 190)}
ENDINGS = ("jpg", "HEIC", "JPG", "HEIC", "avif", "webp", "HEIC", "jpeg")
FORMS = {"heic": "HEIF", "avif": "AVIF", "webp": "WEBP"}
FAST = {"AVIF": {"speed": 10}}
EACH = 36  # photographs of a kind, above 100 in all, so that some are for validation
SMALL = [
    *SHORT,
    "loop.minutes=null",
    "loop.total_steps=12",
    "loop.batch_size=16",
    "model.name=resnet10t",
    "init_from=null",
]


def draw(kind, number):
    """Return a photograph of a kind: soft colours around its own."""
    draw = np.random.default_rng([number, *KINDS[kind]])
    soft = Image.fromarray(draw.integers(0, 256, (5, 6, 3), np.uint8)).resize((96, 64), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(soft) * 0.5 + np.multiply(KINDS[kind], 0.5)).astype(np.uint8))


def make_phone(root, count):
    """Write the folders of a phone as a Mac copies them; returns how many photographs and films."""
    made = [0, 0]
    for kind in KINDS:
        folder = root / unicodedata.normalize("NFD", kind)
        folder.mkdir(parents=True)
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        for number in range(count):
            name = unicodedata.normalize("NFD", f"{'IMG' if number % 5 else 'Föto'}_{number:04}.{ENDINGS[number % 8]}")
            exif = turned((1, 6, 3, 8)[number % 4])
            form = FORMS.get(name.rpartition(".")[2].lower(), "JPEG")
            draw(kind, number).save(folder / name, form, exif=exif.tobytes(), quality=90, **FAST.get(form, {}))
            made[0] += 1
            if number % 6 == 0:
                (folder / name).with_suffix(".MOV").write_bytes(b"\0\0\0\x14ftypqt  ")
                made[1] += 1
            if number % 6 == 1:
                (folder / f"._{name}").write_bytes(b"\0\5\x16\7")
    return made


def test_photographs_of_a_phone_are_all_learned_from(tmp_path, capsys):
    pytest.importorskip("pillow_heif", reason="make install-formats")
    load_package("pillow-heif")
    photographs, films = make_phone(tmp_path / "phone", EACH)
    make_phone(tmp_path / "new", 8)
    words = {"PHOTOS": "phone", "NEW": "new", "RUN": "mine", "SORTED": "sorted"}
    short = {"train.py": SMALL, "predict.py": ["device=cpu"], "evaluate.py": ["runtime.device=cpu"]}
    checked, trained, measured, predicted = follow("photographs.md", tmp_path, words, short)

    said = capsys.readouterr().err
    unused = f"not used: {films} files of kinds that no reader takes: .mov {films}"
    assert {line for line in said.splitlines() if "data.root: not used" in line} == {f"data.root: {unused}"}
    val = round(photographs / 10 / 3) * 3
    assert f"{photographs - val} training and {val} validation images of 3 classes; no fault" in checked
    assert "top1=" in measured and "24 images" in predicted
    assert "unreadable" not in said

    rows = read_table(tmp_path / "sorted/predictions.csv")
    assert len(rows) == 24 and {row["class"] for row in rows} <= set(KINDS) and not any(row["error"] for row in rows)
    kinds = ["unsure" if row["unsure"] == "True" else row["class"] for row in rows]
    copies = [file.relative_to(tmp_path / "sorted").parts[0] for file in (tmp_path / "sorted").rglob("*.[!M]*")]
    assert sorted(copies) == sorted([*kinds, "predictions.csv", "undo.sh"])
    assert len([*(tmp_path / "sorted").rglob("*.MOV")]) == len([*(tmp_path / "new").rglob("*.MOV")])
    files = contents(tmp_path / "new")
    undo = subprocess.run(["sh", tmp_path / "sorted/undo.sh"], check=False)
    assert contents(tmp_path / "new") == files
    assert {file.name for file in (tmp_path / "sorted").rglob("*.*")} == {"predictions.csv", "undo.sh"}, undo
