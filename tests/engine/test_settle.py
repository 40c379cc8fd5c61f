"""What settles a configuration before a run: what is stated is never replaced, in whatever way it is stated."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from engine.recipe import settle
from engine.tasks.kind import open_kind
from tests.in_process import TINY, configure, make_images, run
from tests.support import refuses
from utils.config.command_line import By, Job
from utils.config.entry_point import recompose
from utils.config.recipe import flatten
from utils.errors import UserError
from utils.io.files import write_json


@pytest.mark.parametrize(
    "words, key, by",
    [
        (["optim.lr=0.1"], "optim.lr", By.WORD),
        (["+optim.lr=0.1"], "optim.lr", By.WORD),
        (["++optim.lr=0.1"], "optim", By.WORD),
        (["~optim.lr"], "optim.lr", By.WORD),
        (["optim={lr: 0.1, extra: {d: 1}}"], "optim.lr", By.WORD),
        (["optim={lr: 0.1, extra: {d: 1}}"], "optim.extra.d", By.WORD),
        (["optim={lr: 0.1}"], "optim.weight_decay", By.NOTHING),
        (["optim=adan"], "optim", By.WORD),
        (["optim=adan"], "optim.lr", By.CHOICE),
        (["optim.lr=0.1"], "optim.lr_scale", By.NOTHING),
        (["experiment=tagger/adan"], "schedule.restarts", By.EXPERIMENT),
        (["experiment=tagger/adan"], "optim.weight_decay", By.FILE),  # of the file that it chooses
        (["experiment=tagger/adan"], "task.min_count", By.EXPERIMENT),  # of the recipe below it
        (["experiment=tagger/adan"], "loop.early_stop_epochs", By.NOTHING),
        (["experiment=tagger/adan", "optim.lr=1"], "optim", By.WORD),
        (["experiment=null"], "optim", By.NOTHING),
    ],
)
def test_a_key_is_stated_by_words_files_and_recipes(words, key, by):
    assert Job("train", dict.fromkeys(("optim", "task", "model", "data"), ""), words).stated(key) == by


def test_words_of_a_plan_are_the_least_firm():
    job = Job("train", {"optim": "muon"}, ["model.name=x"], ("optim=muon", "init_from=timm"))
    assert [job.stated(key) for key in ("init_from", "optim.lr", "model.name")] == [By.PLAN, By.PLAN, By.WORD]
    assert not job.states("init_from")


FINETUNE = ["finetune", "data.root=in"]
TIMM = [*FINETUNE, "model=timm", "model.name=resnet18", "init_from=timm"]
SDXL = ["finetune_sdxl", "data.root=in", "data.concepts=[]", "model=sdxl_tiny"]
# Commands for which rules change keys.
COMMANDS = [
    [*FINETUNE, "schedule.warmup_steps=20"],
    [*FINETUNE, "optim=prodigy", "+optim.extra.d0=1.0"],
    TIMM,
    [*FINETUNE, "loop.minutes=2"],
    ["pretrain_fcmae", "data.root=in"],
    [*SDXL, "runtime.memory_gib=1"],
    [*SDXL, "optim=prodigy", "experiment=sdxl/lora"],
]


@pytest.fixture(autouse=True)
def twenty_images(monkeypatch):
    monkeypatch.setattr(settle, "training_rows", lambda *_: range(20))


def settled(script, words):
    return settle_all(*configure(script, words))


def settle_all(config, job):
    start = SimpleNamespace(job=job, runtime=SimpleNamespace(precision="bf16"), collection=lambda data: None)
    for change in settle.list_changes(open_kind(config.task.name)):
        config = settle.make(change, config, start)
    return flatten(config.model_dump())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[1:]))
def test_what_is_stated_survives_or_ends_the_command(command, monkeypatch):
    """Of every key of the schema: all keys at once, and each key that a rule changes, alone and in each way."""
    needed = lambda config, _: {"step": 2.0 - config.runtime.offload - config.runtime.grad_checkpointing}  # noqa: E731
    monkeypatch.setattr("sdxl.memory.predict_memory", needed)
    config, job = configure(command[0], command[1:])
    before = flatten(config.model_dump())
    free = settle_all(config, job)
    changed = [key for key in before if free.get(key) != before[key]]
    assert changed or "loop.minutes=2" in command
    firm = [key for key, value in before.items() if value not in (None, "auto", {}, [])]  # a rule completes these
    stated = [*firm]
    while stated:
        try:
            after = settle_all(config, replace(job, overrides=[*job.overrides, *(f"++{key}=null" for key in stated)]))
        except UserError as refused:
            named = str(refused).partition(":")[0]
            if named not in stated:  # a key of the command, which cannot be as it asks
                assert f"{named}=" in " ".join(command)
                break
            stated.remove(named)
        else:
            assert {key: after.get(key) for key in stated} == {key: before[key] for key in stated}
            break
    for key in filter(firm.__contains__, changed):
        for way in (f"{key}=null", f"++{key}=null", "{}={{{}: null}}".format(*key.split(".", 1))):
            try:
                assert settle_all(config, replace(job, overrides=[*job.overrides, way]))[key] == before[key], way
            except UserError as refused:
                assert key in str(refused)


def test_a_chosen_file_keeps_its_values_against_those_of_timm(monkeypatch):
    """timm trained with another crop; without the file, it is taken."""
    monkeypatch.setattr("models.weights.timm_hub.stated_preprocessing", lambda _: {
        "image_size_hw": [224, 224], "eval_crop": 0.5, "mean": [0.5] * 3, "std": [0.5] * 3,
    })  # fmt: skip
    for words, crop, mean in (([], 0.5, [0.5] * 3), (["augment=light"], 0.875, [0.485, 0.456, 0.406])):
        values = settled("finetune", [*TIMM[1:], *words])
        assert (values["augment.eval_crop"], values["augment.mean"]) == (crop, mean)


@pytest.mark.parametrize("key, value", [("loop.batch_size", 48), ("optim.base_lr", 0.7), ("schedule.warmup_most", 0.3)])
def test_an_experiment_states_as_a_word_does(key, value, tmp_path):
    group, name = key.split(".")
    write_json(tmp_path / "recipe.yaml", {group: {name: value}})
    words = [*FINETUNE[1:], "schedule.warmup_steps=20", f"experiment={tmp_path / 'recipe.yaml'}"]
    assert settled("finetune", words)[key] == value


def test_an_older_run_goes_on_with_what_held_before(tmp_path):
    """It read no table, and its stated warm-up was cut; what is stated now is compared with that."""
    folder, words = tmp_path / "run", [*FINETUNE[1:], "schedule.warmup_steps=20", f"run_dir={tmp_path}/run"]
    config, _ = configure("finetune", words)
    values = config.model_dump(mode="json")
    del values["data"]["table"]
    folder.mkdir()
    write_json(folder / "config.json", values)
    assert [settled("finetune", words)[key] for key in ("data.table", "schedule.warmup_most")] == ["none", 0.1]
    assert settled("finetune", [*words, "data.table=auto"])["data.table"] == "auto"


@pytest.mark.parametrize("words", [["++loop.total_steps=3"], ["loop={total_epochs: 3}"]])
def test_two_lengths_are_refused(words):
    with refuses("^loop.minutes: 1 sets the length, and so does loop.total_"):
        settled("finetune", ["data.root=in", "loop.minutes=1", *words])


@pytest.mark.parametrize("images, batch", [(1, 8), (20, 16), (127, 64)])
def test_a_default_holds_where_nothing_is_stated(images, batch, monkeypatch, log):
    """A batch has no more images than the collection, at the rate of the recipe; warm-up is a tenth at most."""
    monkeypatch.setattr(settle, "training_rows", lambda *_: range(images))
    values = settled("finetune", ["data.root=in", "schedule=cosine"])
    assert (values["loop.batch_size"], values["schedule.warmup_most"]) == (batch, 0.1)
    assert (f"loop.batch_size 64 -> {batch}" in log.text) == (batch < 64)
    stated = settled("finetune", ["data.root=in", "schedule.warmup_steps=20", "loop.batch_size=64"])
    assert (stated["loop.batch_size"], stated["schedule.warmup_most"]) == (64, 1.0)
    assert values["optim.base_lr"] * batch == pytest.approx(64 * stated["optim.base_lr"], rel=1e-12)


def test_prodigy_takes_its_own_rate_where_the_command_has_none():
    words = ["experiment=sdxl/lora", "data.root=x", "data.concepts=[]", "model=sdxl_tiny", "optim=prodigy"]
    for own, rate in (([], 1.0), (["optim.lr=0.5"], 0.5)):
        assert settled("finetune_sdxl", [*words, *own])["optim.lr"] == rate
    with refuses("^optim.lr: 0.0001, but optim asks for 1.0"):
        settled("finetune_sdxl", [*words, "++optim.lr=1e-4"])


def test_a_plan_and_a_recipe_without_a_network_keep_that_of_init_from(tmp_path):
    model = {
        "family": "timm",
        "name": "resnet18d",
        "in_channels": 3,
        "drop_path_rate": 0.5,
        "channels": None,
        "image_size_hw": None,
    }
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run/config.json", {"model": model | {"pretrained": "never"}})
    write_json(tmp_path / "recipe.yaml", {"loop": {"batch_size": 48}})
    words = [f"init_from={tmp_path / 'run'}", f"experiment={tmp_path / 'recipe.yaml'}", "++model.drop_path_rate=0.1"]
    config, job = configure("train", words)
    config = recompose(job, ["optim=muon"], type(config))
    assert (config.optim.opt, config.model.name, config.model.drop_path_rate) == ("muon", "resnet18d", 0.1)


def test_a_typed_warmup_that_is_longer_than_the_run_is_refused(tmp_path):
    make_images(tmp_path / "images")
    words = [*TINY, "data.root=images", "schedule=cosine", "loop.total_steps=10", "dry_run=true"]
    run("finetune", [*words, "schedule.warmup_steps=10"], tmp_path)
    with refuses("^schedule.warmup_steps: 11 "):
        run("finetune", [*words, "schedule.warmup_steps=11"], tmp_path)
