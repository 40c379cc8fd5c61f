"""evaluate.py job=compare: taggers over files of the WD form, runs and weight files; report.html; refusals."""

import itertools

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.in_process import SHORT, SMALL_MODEL, run
from tests.support import read_table, refuses
from utils.formats.vocabulary import Vocabulary, write_vocabulary
from utils.io.files import read_json

COLOURS = {"red": (230, 10, 20), "green": (10, 220, 30), "blue": (20, 10, 240)}
ROWS = [(9, "general"), (9, "sensitive"), (0, "blue"), (0, "Green"), (0, "red"), (0, "rare"), (0, "of_no_image")]
ON_CPU = ["runtime.device=cpu", "runtime.threads=1", "runtime.workers=0", "batch_size=5"]
DATA = ["data=image_folder", "data.root=images"]
ARENA = ["job=compare", *DATA, *ON_CPU, "rating_s=sensitive", "min_support=4"]


def write_colours(root, counts, height=12, step=1):
    """Write noisy images of each colour for each split; yield each file and its number."""
    draw = np.random.default_rng(0)
    for split, colour in itertools.product(counts, COLOURS):
        (root / split / colour).mkdir(parents=True)
        for number in range(counts[split]):
            noise = draw.integers(-10, 10, (height, height + step * number, 3))
            path = root / split / colour / f"{number}.png"
            Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)).save(path)
            yield path, number


def write_wd(folder, rows=ROWS, columns=(0, 0, 0, 1, 2, 0, 0), scale=12.0, batch="batch"):
    """Write a tagger whose probabilities are sigmoid(scale * (mean of an input's channel / 255 - 0.5))."""
    listed = (scale / 255 * np.eye(3)[:, list(columns)]).ravel().tolist()
    weights, bias = (", ".join(map(str, numbers)) for numbers in (listed, [-scale / 2] * len(columns)))
    model = onnx.parser.parse_model(f"""<ir_version: 9, opset_import: ["": 18]>
        g (float[{batch}, 8, 8, 3] x) => (float[{batch}, {len(columns)}] probs)
        <float[3, {len(columns)}] w = {{{weights}}}, float[{len(columns)}] b = {{{bias}}}, int64[2] axes = {{1, 2}}> {{
            mean = ReduceMean<keepdims=0>(x, axes)
            logits = Gemm(mean, w, b)
            probs = Sigmoid(logits)
        }}""")
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    categories, names = zip(*rows)
    counts = tuple(0 if name == "of_no_image" else 9 for name in names)
    write_vocabulary(folder / "selected_tags.csv", Vocabulary(names, categories, counts, (0,) * len(rows)))
    return folder


@pytest.fixture(scope="module")
def place(folder):
    """Return a folder with 36 tagged images of three colours, a run on them, and two taggers of others."""
    for path, number in write_colours(folder / "images", {"train": 8, "val": 4}):
        rare = ", rare" if number == 0 and path.parent.parent.name == "val" else ""
        path.with_suffix(".txt").write_text(f"{path.parent.name}, rating:{'gs'[number % 2]}{rare}, extra")
    tagging = ["task=tagging", "task.min_count=1", "task.rating_s=sensitive", "augment.image_size_hw=[16,16]"]
    run("train", [*SMALL_MODEL, *SHORT, *DATA, *tagging, "run_dir=run"], folder)
    write_wd(folder / "wd")
    write_wd(folder / "one", batch=1)  # as old files are
    write_wd(folder / "blind", columns=(0, 0, 1, 2, 0, 0, 0))  # takes the channels for others
    return folder


def test_taggers_of_ours_and_of_others_are_compared(place):
    words = ["models=[blind,run,one,run/weights/last_weights.safetensors,wd]", "split=all"]
    line = run("evaluate", [*ARENA, *words], place)
    (folder,) = (place / "outputs/evaluate").glob("arena-*")
    found = read_json(folder / "arena.json")
    rows = {row["model"]: row for row in found["models"]}
    assert found["tags"] == 3 and found["images"] == 36  # `rare` is on too few
    assert line.startswith(next(iter(rows))) and rows["one"] == {**rows["wd"], "model": "one"}
    assert run("evaluate", [*ARENA, "models=[wd,run]", "dry_run=true"], place).startswith("dry run")
    tags = {row["tag"]: row for row in read_table(folder / "tables/arena_tags.csv")}
    assert set(tags) == {"general", "sensitive", "extra", *COLOURS}
    assert tags["extra"]["run"] == "1.0" and not tags["extra"]["wd"]
    groups = {row["group"] for row in read_table(folder / "tables/arena_groups.csv") if row["model"] == "run"}
    assert groups == {"all", "old", "new", "general", "rating"}
    assert read_table(folder / "tables/arena_changes.csv")[-1]["tag"] in COLOURS
    images = read_table(folder / "tables/arena_images.csv")
    assert {row["wd"] for row in images if row["tag"] in COLOURS} == {"right"}  # its channels are BGR
    assert {row["blind"] for row in images} >= {"wrong", "missed"}


def test_the_figures_of_a_run_are_those_of_evaluate(place):
    """On the validation images alone."""
    run("evaluate", [*ARENA, "min_support=1", "models=[run]", "output=arena"], place)
    run("evaluate", ["run_dir=run", *ON_CPU, "calibrate=true"], place)
    found, wanted = read_json(place / "arena/arena.json"), read_json(place / "run/metrics.json")
    (row,) = found["models"]
    assert found["images"] == wanted["samples"] == 12
    for name in ("mAP", "macro_f1", "micro_f1", "micro_f1_at_0.35"):
        assert row[name] == pytest.approx(wanted[name], abs=1e-6)
    assert ">thresholds</h2>" in (place / "run/report.html").read_text("utf-8")


CLASHES = {
    "no tag in common": lambda folder: write_wd(folder, rows=[*ROWS[:2], *((4, name) for _, name in ROWS[2:])]),
    "another width": lambda folder: write_wd(folder, rows=ROWS[:-1]),
}


@pytest.mark.parametrize("clash", CLASHES)
def test_models_that_cannot_be_compared_are_refused(clash, place, tmp_path):
    CLASHES[clash](tmp_path / "other")
    with refuses("^models: "):
        run("evaluate", [*ARENA, f"models=[wd,{tmp_path / 'other'}]"], place)
