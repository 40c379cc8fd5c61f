"""finetune_sdxl.py on concepts: exact resume, losses of priors, weights, captions of their own, and refusals."""

import pytest
import torch

pytest.importorskip("diffusers", reason="make install-sdxl")

from data.tags.captions import Captions
from tests.data.collection.test_collection import load, put
from tests.in_process import check_resumption, configure, run, run_command, working_in
from tests.sdxl.test_diffusion import FIVES, RESUMED, SHORT, build, losses, make_batch
from tests.sdxl.test_diffusion_refusals import refused
from tests.small_sdxl import complete
from tests.support import contents, refuses, rows
from utils.record.run_reader import RunReader

CONCEPTS = "data.concepts=[{path: dog, repeats: 3, trigger: sks}, {path: reg, share: 0.4, is_prior: true, weight: 0.5}]"


@pytest.fixture(scope="module")
def place(folder):
    put(folder / "images", *(f"dog/{number}.png" for number in range(5)), text="a dog")
    put(folder / "images", *(f"reg/{number}.png" for number in range(9)), "dog/9.png")
    put(folder / "kohya", "img/3_sks dog/a.png", "img/3_sks dog/b.png", "reg/1_dog/c.png")
    return folder


def test_killed_and_resumed_equals_uninterrupted_and_a_changed_concept_is_refused(place):
    """From caches, whose keys do not depend on concepts: another table of them encodes nothing again."""
    own = [*SHORT, *RESUMED, *FIVES, "data.root=images", "task.latent_cache=latents", "task.text_cache=texts"]
    own += ["task.text_variants=2", "task.tag_weights={power: 0.5, low: 0.1, high: 3.0, factors: {}}"]
    check_resumption("finetune_sdxl", [*own, CONCEPTS], place, killed_at=4, steps=6)
    files = [contents(place / name).keys() for name in ("latents", "texts")]
    assert any(row["prior_loss"] is not None for row in rows(place / "straight/metrics.jsonl", "train"))
    with refuses("data.concepts"):
        run("finetune_sdxl", [*own, CONCEPTS.replace("repeats: 3", "repeats: 2"), "run_dir=killed"], place)
    run("finetune_sdxl", [*own, CONCEPTS.replace("repeats: 3", "repeats: 2"), "run_dir=other"], place)
    assert files == [contents(place / name).keys() for name in ("latents", "texts")]


def test_folders_of_sd_scripts_are_concepts_and_an_empty_list_switches_that_off(place, capsys):
    run("finetune_sdxl", [*SHORT, "data.root=kohya", "dry_run=true"], place)
    said = " ".join(capsys.readouterr().err.split())
    assert " 2 3 50.0% img/3_sks dog 1 sks dog 2 " in said and " 1 6 50.0% reg/1_dog yes 1 dog 1 " in said
    with refuses("none of the 3 images"):
        run("finetune_sdxl", [*SHORT, "data.root=kohya", "data.concepts=[]", "dry_run=true"], place)


def test_the_weight_of_a_concept_scales_its_loss_and_priors_are_logged_without_it():
    task, batch = build(), make_batch()
    plain = losses(task, batch).detach()
    own = {"loss_weight": torch.tensor([1.0, 0.5, 2.0, 1.0]), "is_prior": torch.tensor([False, True, True, False])}
    output = task(batch | own, torch.zeros(()))
    torch.testing.assert_close(output.loss, plain * own["loss_weight"])
    total, count = output.logs["prior_loss"]
    torch.testing.assert_close(total / count, plain[1:3].mean())


def test_a_concept_changes_the_captions_of_its_rows(place, tmp_path):
    concepts = "data.concepts=[{path: dog, captions: {prefix: sks}}, {path: reg, trigger: thing}]"
    texts = captions_of(place, tmp_path, "data.root=images", concepts)
    assert [texts[row] for row in (0, 5, 6)] == ["sks, a dog", "sks", "thing"]


@pytest.mark.parametrize(
    "concept, key",
    [
        ("{path: dog, captions: {shufle: true}}", "data.concepts.0.captions.shufle: unknown key; close: shuffle"),
        ("{path: dog, captions: {shuffle: 3}}", "data.concepts.0.captions.shuffle: must be"),
        ("{path: dog, captions: {emphasis: true}}", "data.concepts.0.captions.emphasis: all concepts"),
        ("{path: dog, repeats: 2, share: 0.5}", "data.concepts.0: 'dog' has repeats=2 and share=0.5"),
        ("{path: dog, repeat: 2}", "data.concepts.0.repeat: unknown key"),
        ("{path: dog, mask: true}", "data.concepts.0.mask: true, but task.mask is null"),
        ("{path: cat}", "data.concepts.0.path: "),
        ("{path: dog, share: 0}", "data.concepts: the shares sum to 0"),
    ],
)
def test_wrong_concepts_are_refused_by_key(concept, key, place, monkeypatch, capsys):
    assert key in refused(place, monkeypatch, capsys, f"data.concepts=[{concept}]")


def test_a_trigger_is_before_each_caption_that_does_not_have_it_and_no_prior_has_one(place, tmp_path, capsys):
    put(place / "mixed/dog", "a.png", text="a dog")
    put(place / "mixed/dog", "b.png", text="A Sks Dog, running")
    put(place / "mixed/dog", "c.png")
    texts = captions_of(place, tmp_path, "data.root=mixed", "data.trigger=sks dog", "task.captions.shuffle=true")
    assert texts == ["sks dog, a dog", "A Sks Dog, running", "sks dog"]
    texts = captions_of(place, tmp_path, "data.root=kohya", "data.trigger=zwx dog")
    assert texts == ["zwx dog", "zwx dog", "dog"], "in place of the folder's own name; the prior keeps its"
    run("finetune_sdxl", [*SHORT, "data.root=kohya", "data.trigger=zwx dog", "dry_run=true"], place)
    assert "the trigger alone 2" in capsys.readouterr().err
    for words in ([CONCEPTS, "data.root=images"], ["task.captions.prefix=a", "data.root=kohya"]):
        with refuses("^data.trigger: 'sks' is the trigger of all"):
            run("finetune_sdxl", [*SHORT, *words, "data.trigger=sks"], place)


def captions_of(place, cache, *words):
    """Return the complete caption of each image of a run, by path."""
    config, _ = configure("finetune_sdxl", [*SHORT, *words])
    with working_in(place):
        config = complete(config)
        collection = load(config.data.root, cache, **config.data.index_settings())
    rules = Captions(config.task.captions, collection)
    return [rules.of(row).arrange(rules.of(row).read(collection.row(row))[0]) for row in range(len(collection))]


@pytest.mark.parametrize("script", ["train", "finetune_vae", "prepare"])
def test_other_scripts_refuse_concepts(script):
    for word, key in (
        ("data.concepts=[{path: y}]", "data.concepts: are"),
        ("data.trigger=sks", "data.trigger: 'sks' is"),
    ):
        with refuses(f"{key} for .*finetune_sdxl.py"):
            configure(script, ["data=image_folder", "data.root=x", word])


def test_an_imported_dataset_config_trains_as_an_experiment(place, capsys, monkeypatch):
    """The command line goes before the file; without the file, or in one with a wrong key, it is named."""
    subsets = [
        "image_dir = 'images/dog'\nnum_repeats = 4",
        "image_dir = 'images/reg'\nis_reg = true\nclass_tokens = '${seed}'",  # never interpolated
    ]
    text = "[[datasets]]\nresolution = 64\n" + "".join(f"[[datasets.subsets]]\n{each}\n" for each in subsets)
    (place / "d.toml").write_text(text)
    assert run_command("prepare", ["job=import", "source=d.toml", "output=my file.yaml"], place, monkeypatch) == 0
    own = [word for word in SHORT if "sizes_hw" not in word]
    words = [*own, "experiment=my file.yaml", "loop.micro_batch_size=2", "loop.total_steps=1", "run_dir=imported"]
    assert run_command("finetune_sdxl", words, place, monkeypatch) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert " 6 4 50.0% dog " in said and " 50.0% reg yes " in said
    saved = RunReader(place / "imported").config
    assert saved["data"]["concepts"][1]["trigger"] == "${seed}"
    assert saved["task"]["buckets"]["sizes_hw"] == [[[64, 64]]] and saved["loop"]["micro_batch_size"] == 2
    (place / "wrong.yaml").write_text("data:\n  concept: []\n")
    for name, key in (("none.yaml", "experiment: none.yaml"), ("wrong.yaml", "data.concept: unknown key")):
        assert key in refused(place, monkeypatch, capsys, f"experiment={name}")
