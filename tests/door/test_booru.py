"""A booru folder: posts with .txt or .json, copies, tags of several spellings; ends as a tagger for ComfyUI
(docs/booru.md)."""

import random

import numpy as np
import onnxruntime
from PIL import Image

from tests.door.follow import follow
from tests.in_process import run
from tests.support import contents, draw_shape, read_table, refuses
from utils.io.files import write_json

ON_CPU = ["runtime.device=cpu", "runtime.threads=1"]
SHORT = [
    "model=convnextv2_atto", "model.depths=[1,1,1,1]", "model.dims=[8,16,24,32]", "model.head_init_scale=1.0", *ON_CPU,
    "loop.minutes=null", "loop.total_steps=6", "loop.batch_size=16", "loop.micro_batch_size=16",
    "augment.image_size_hw=[32,32]",
]  # fmt: skip
NAMES = {"blue hair": "hatsune miku", "red hair": "kasane teto", "green hair": "gumi (vocaloid)"}


def draw_post(number):
    """Return a drawing, and its tags as words: the shape tells the hair, which tells the character."""
    hair = list(NAMES)[number % 3]
    image = Image.fromarray(draw_shape("ABC"[number % 3], random.Random(number))).resize((160, 200))
    return image, ["1girl", hair, NAMES[hair], *["witch hat"] * (number % 2)]


def write_post(folder, number):
    """Write a post as one of four programs does."""
    image, tags = draw_post(number)
    form = number % 4
    name = folder / f"{7000 + number}{('.png', '.jpg', '.webp', '.png')[form]}"
    image.save(name)
    post = {"id": 7000 + number, "rating": "gs"[number % 2]}
    words = [tag.replace(" ", "_") for tag in tags]
    if form == 0:  # Danbooru's own
        lists = {"tag_string_character": words.pop(2), "tag_string_general": " ".join(words)}
        write_json(name.with_suffix(".json"), {**post, **lists})
    elif form == 1:  # gallery-dl, beside the whole name
        write_json(folder / f"{name.name}.json", {"category": "danbooru", **post, "tags": words})
    elif form == 2:  # by hand, for a web UI
        text = f"1 Girl, ({tags[1]}:1.2), {tags[2]}".title()
        name.with_suffix(".txt").write_text(text.replace("(V", "\\(V").replace("d)", "d\\)"))
    else:
        name.with_suffix(".txt").write_text(", ".join(words))
    return name


def test_the_page_leads_from_posts_to_a_tagger_for_comfyui(tmp_path, caplog):
    (tmp_path / "posts").mkdir()
    files = [write_post(tmp_path / "posts", number) for number in range(80)]
    for number in (3, 10, 20):  # each twice again, in other sizes and formats; one of the copies with tags
        image = Image.open(files[number])
        image.resize((80, 100), Image.Resampling.LANCZOS).save(tmp_path / f"posts/sample-{number}.jpg", quality=80)
        image.resize((240, 300), Image.Resampling.BICUBIC).save(tmp_path / f"posts/orig_{number}.webp", quality=90)
        (tmp_path / f"posts/sample-{number}.txt").write_text(", ".join(draw_post(number)[1]))
    (tmp_path / "new").mkdir()
    for number in range(80, 84):
        draw_post(number)[0].save(tmp_path / f"new/{number}.png")
    before = contents(tmp_path / "posts")
    with refuses("tags on 83 images .*task=tagging"):  # what a newcomer types first
        run("train", ["data.root=posts", "run_dir=first", *SHORT], tmp_path)
    with refuses("rating_s: null, but images are rated s; set sensitive"):
        run("train", ["task=tagging", "data.root=posts", "run_dir=first", *SHORT], tmp_path)
    caplog.clear()
    short = {"train.py": SHORT, "evaluate.py": ON_CPU, "predict.py": ["device=cpu"]}
    results = follow("booru.md", tmp_path, {"POSTS": "posts", "NEW": "new"}, short)
    assert "6 images show the same picture as another image" in caplog.text
    assert results[2].startswith("6 images excluded")
    assert "1_girl,1girl" in caplog.text and (tmp_path / "outputs/tags_aliases.csv").read_text() == "1_girl,1girl\n"
    after = contents(tmp_path / "posts")
    assert before.items() < after.items() and after.keys() - before.keys() == {"manifest.parquet"}

    folder = tmp_path / "outputs/tagger/export/wd14"
    tags = {row["name"]: int(row["count"]) for row in read_table(folder / "selected_tags.csv")}
    names = ["1girl", "witch_hat", "hatsune_miku", "kasane_teto", "gumi_(vocaloid)"]
    assert list(tags)[:4] == ["general", "sensitive", "questionable", "explicit"] and {*names} < {*tags}
    assert len(tags) == 12 and tags["1girl"] == 64  # of four fifths of 80 posts, in both spellings
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert session.run(["output"], {"input": np.zeros((1, 32, 32, 3), np.float32)})[0].shape == (1, 12)
    assert sorted(file.name for file in tmp_path.glob("new/*.txt")) == [f"{number}.txt" for number in range(80, 84)]
