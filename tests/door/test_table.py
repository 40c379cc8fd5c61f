"""A spreadsheet: labels.csv of a German Excel, some names without ending, a few missing files (docs/table.md)."""

from tests.door.follow import follow
from tests.door.test_held_out import ON_CPU, SHORT
from tests.support import make_collection, read_table

QUICK = {
    "train.py": [*SHORT[:-1], "data.validation_fraction=0.2"],
    "evaluate.py": ON_CPU,
    "predict.py": ["device=cpu"],
}


def make_spreadsheet(folder):
    """Move drawn images into one folder, and write their classes as Excel does."""
    made = make_collection(folder / "made", per_class=10, validation=0)
    (folder / "photos/pictures").mkdir(parents=True)  # one folder tells no class
    rows = ["filename;klasse;schärfe"]
    for number, file in enumerate(sorted(made.rglob("*.png"))):
        name = f"IMG_{number:03}"
        file.rename(folder / f"photos/pictures/{name}.png")
        label = f"Käfer {file.parent.name}"
        rows += [f"{name}{'.png' if number % 3 else ''};{label};0,{number}"] if number else []
    rows += ["IMG_900.png;Käfer A;0,5", *(f"IMG_90{number};Käfer B;0,5" for number in range(1, 6))]
    (folder / "photos/labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")


def test_a_spreadsheet_ends_with_a_classifier_and_a_list_of_what_does_not_match(tmp_path, log):
    make_spreadsheet(tmp_path)
    follow("table.md", tmp_path, {"PHOTOS": "photos", "RUN": "run"}, QUICK)
    assert "filename names 29 of 30 files in pictures/, with .png; label: klasse" in log.text
    assert "6 rows of labels.csv without an image: IMG_900.png, IMG_901" in log.text
    (listing,) = {*tmp_path.glob("outputs/cache/collections/unused_*.csv")}
    assert {row["name"] for row in read_table(listing)} >= {"IMG_900.png", "IMG_905", "pictures/IMG_000.png"}
    assert len(read_table(tmp_path / "classes.csv")) == 30
