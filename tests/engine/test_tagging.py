"""The tagger: its loss, mirror, head and facts on a batch, and whole runs on a folder of images with sidecars."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench.measure import read_group
from data.layouts.table import build_table
from data.stream.batch import Ragged, collate
from data.tags.fields import read_targets
from data.tags.rules import TagRules
from data.tags.tag_index import map_tags
from engine.exports.opened_task import open_task
from engine.tasks.config import LossWeightsConfig, TaggingTaskConfig
from engine.tasks.kind import Setup
from engine.tasks.tag_losses import prior_bias
from engine.tasks.tagging import TaggingKind
from tests.engine.test_tasks import MODEL, PREPROCESSING, learn, make_batch, runtime  # noqa: F401 (a fixture)
from tests.in_process import SHORT, SMALL_MODEL, check_resumption, configure, run
from tests.support import make_collection, read_table, refuses, rows
from utils.config.messages import ConfigError
from utils.formats.vocabulary import Vocabulary, read_vocabulary
from utils.io.files import read_json
from utils.io.weights import read_weights, write_weights

VOCABULARY = Vocabulary(
    ("general", "sensitive", "questionable", "explicit", "left_arm", "right_arm", "text", "left_eye"),
    (9, 9, 9, 9, 0, 0, 0, 0), (20, 10, 5, 5, 16, 12, 8, 4), tuple(range(8)),
)  # fmt: skip
PRIORS = [0.5, 0.25, 0.1, 0.1, 0.4, 0.3, 0.9, 0.0]
FACTS = {
    **VOCABULARY.facts(), "tag_priors": PRIORS, "orientation": {"pairs": [[4, 5]], "dropped": [7], "no_flip": [6]},
}  # fmt: skip
CONFIG = read_group(TaggingTaskConfig, "task", "tagging", min_count=1)
TAGS = [[0, 4], [1, 5, 6], [4, 7], [2], [0, 4, 5], [3, 7], [1, 6], [0]]


def make(facts=FACTS, **changes):
    torch.manual_seed(0)
    return TaggingKind().build(Setup(MODEL, CONFIG.model_copy(update=changes), PREPROCESSING, facts))


def make_tags(tags=TAGS):
    """A batch; an image without a rating has an unknown one."""
    ratings = torch.arange(4)
    lists = [(torch.tensor(own), ratings[: 0 if own[0] < 4 else 4]) for own in tags]
    samples = [{"tags": Ragged(own), "unknown_tags": Ragged(unknown)} for own, unknown in lists]
    return make_batch(len(tags)) | collate(samples, len(tags))


# --- a batch


def test_one_batch_is_learned_by_heart(runtime):  # noqa: F811
    first, last = learn(make(facts={**VOCABULARY.facts(), "tag_priors": PRIORS}), make_tags(), runtime, steps=80)
    assert last < first / 10


def test_the_head_begins_with_the_frequencies():
    bias = make().network.head.bias.sigmoid()
    assert bias.tolist() == pytest.approx([0.5, 0.25, 0.1, 0.1, 0.4, 0.3, 0.5, 1 / (1 + np.exp(8))], abs=1e-6)
    assert make(facts=VOCABULARY.facts()).network.head.bias.abs().max() == 0  # as a file is rebuilt


def test_an_unknown_rating_masks_its_four_columns_alone():
    task, batch = make(facts=VOCABULARY.facts()), make_tags([[4], [5, 6]])
    targets = read_targets(batch, 8)
    assert targets[:, :4].isnan().all() and targets[:, 4:].tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    logits = torch.randn(2, 8)
    losses = F.binary_cross_entropy_with_logits(logits[:, 4:], targets[:, 4:], reduction="none")
    torch.testing.assert_close(task.label_losses(logits, targets).sum(1), losses.sum(1))
    task(batch, 0.0).loss.sum().backward()
    rows = task.network.head.weight.grad.abs().sum(1)
    assert (rows[:4] == 0).all() and (rows[4:] > 0).all() and (task.network.head.bias.grad[:4] == 0).all()


def test_a_tag_counts_by_its_mean_loss_over_the_entropy_of_its_frequency():
    """Of two steps, the newer one counts twice; an unreadable image and unknown tags do not."""
    task, batch = make(tag_weights=LossWeightsConfig(power=2.0, window_steps=2)), make_tags([[0, 4], [5, 6], [4]])
    task.mirror = None
    batch["weight"][2] = 0.0
    share = torch.tensor(PRIORS).double().clamp(1e-4, 1 - 1e-4)
    entropy = -share * share.log() - (1 - share) * (1 - share).log()
    losses, counts = entropy.clone(), torch.ones(8).double()
    for step in range(2):
        targets = read_targets(batch, 8)[:2]
        logits = task.network(task.normalise(batch["images"]))[:2].detach()
        loss = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
        wanted = ((losses / counts / entropy) ** 2).clamp(0.2, 1)
        wanted = wanted / wanted.mean()
        torch.testing.assert_close(task(batch, 0.0).loss[:2], (loss * ~targets.isnan() * wanted.float()).sum(1))
        task.after_step(step, torch.tensor(0.0), torch.tensor(1.0))
        losses = losses / 2 + (loss * ~targets.isnan()).sum(0)
        counts = counts / 2 + (~targets.isnan()).sum(0)
        task.network.head.bias.data += 1.0
    torch.testing.assert_close(task.recent, torch.stack([losses, counts]).float())


def test_mixup_takes_the_ratings_out_where_either_is_unknown():
    task, batch = make(mixup_alpha=1.0), make_tags([[0, 4], [1, 5], [2, 6], [7]])
    torch.manual_seed(1)
    task.mirror = None
    _, targets = task.views(batch)
    unknown = targets.isnan()
    assert unknown[:, :4].tolist() == [[True] * 4, [False] * 4, [False] * 4, [True] * 4] and not unknown[:, 4:].any()
    share = float(targets[1, 1])
    assert 0 < share < 1 and targets[2].tolist() == pytest.approx([0, 1 - share, share, 0, 0, 1 - share, share, 0])
    assert task(batch, 0.0).loss.isfinite().all()


def test_images_and_tags_are_mirrored_together_and_in_training_alone():
    """Which tags change, go or forbid a mirror: tests/data/tags/test_orientation.py."""
    task, batch = make(), make_tags([[0, 4]] * 20)
    plain = task.normalise(batch["images"])
    images, targets = task.views(batch)
    mirrored = torch.tensor([torch.equal(one, other.flip(-1)) for one, other in zip(images, plain)])
    assert 3 < mirrored.sum() < 17 and torch.equal(targets[:, 5] == 1, mirrored)
    images, targets = task.eval().views(batch)
    assert torch.equal(images, plain) and torch.equal(targets, read_targets(batch, 8))


# --- an earlier tagger


def test_an_earlier_taggers_rows_are_found_by_name_and_new_ones_begin_with_their_mean():
    """A file is read in tests/models/test_foreign_taggers.py."""
    weight, bias = torch.randn(8, MODEL.dims[-1]), torch.randn(8)
    names = ("hat", "text", "left_arm", "general", "general")  # a tag and a rating of one name
    now = Vocabulary(names, (0, 0, 0, 9, 0), (9,) * 5, tuple(range(5)))
    task = make(facts={**now.facts(), "tag_priors": [0.2, 0.3, 0.4, 0.5, 0.1]})
    head = task.match_head({"head.weight": weight, "head.bias": bias}, FACTS, "earlier")
    assert torch.equal(head["head.weight"][1:4], weight[[6, 4, 0]])
    assert torch.equal(head["head.bias"][1:4], bias[[6, 4, 0]])
    torch.testing.assert_close(head["head.weight"][[0, 4]], weight.mean(0).expand(2, -1))
    torch.testing.assert_close(head["head.bias"][[0, 4]], prior_bias(torch.tensor([0.2, 0.1])))
    with refuses("^init_from: earlier has no head of its 8 tags"):
        task.match_head({"head.weight": weight[:3], "head.bias": bias[:3]}, FACTS, "earlier")


# --- what is read of a collection


def test_priors_are_shares_of_the_images_whose_label_is_known():
    tags, unknown = (
        [["left_eye", "rating:g"], ["left_eye"], ["text"], [], ["left_eye"]],
        [["text"], None, ["*"], None, ["*", "-left_eye"]],
    )
    table = build_table({"path": list("abcde"), "tags": tags, "unknown_tags": unknown})
    index = map_tags(table, VOCABULARY, TagRules(None, {}, {}, "task."))
    shares = dict(zip(VOCABULARY.names, index.shares(np.array([0, 1, 2, 3]), 8)))
    assert [shares[name] for name in ("general", "explicit", "left_eye", "text")] == [1, 0, 1, 0.5]


# --- runs

RUN = [
    *SMALL_MODEL, *SHORT, "task=tagging", "task.min_count=1", "task.rating_s=general", "data=image_folder",
    "data.root=images", "model.head_init_scale=1.0", "augment.image_size_hw=[32,32]",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(folder):
    """A folder with images, their sidecars, and a run with an average."""
    make_collection(folder / "images", per_class=8, classes="AB", validation=4)
    for file in (folder / "images").rglob("*.txt"):
        tags = {"A": "square, rating:s", "B": "disc, round, rating:explicit"}[file.parent.name]
        file.write_text(tags.rpartition(", ")[0] if file.stem == "003" else tags)
    run("train", [*RUN, "run_dir=run", "loop.total_steps=60", "loop.ema_decay=0.5", "optim.lr=0.01",
                  "loop.evaluate_every_epochs=15", "loop.checkpoint_every_steps=60", "lr_finder.enabled=false",
                  "loop.batch_size=8", "loop.micro_batch_size=8",
                  "optim=adamw", "schedule=cosine", "schedule.warmup_steps=2"], folder)  # fmt: skip
    return folder


def test_a_run_learns_and_is_judged_by_its_map(place):
    found, losses = (rows(place / "run/metrics.jsonl", kind) for kind in ("evaluate", "train"))
    first, last = (sum(row["loss"] for row in part) for part in (losses[:5], losses[-5:]))
    assert last < 0.8 * first
    figures = {"loss", "mAP", "macro_f1", "micro_f1", "macro_f1_at_0.35", "samples"}
    assert {f"ema/{name}" for name in figures} <= found[-1].keys()
    state = read_json(place / "run/checkpoints/step_00000060/state.json")
    assert state["best"]["value"] == max(row["ema/mAP"] for row in found) > 0.7
    files = " ".join(file.name for folder in ("tables", "plots") for file in (place / "run" / folder).iterdir())
    assert all(name in files for name in ("tags", "tag_groups", "pr_curves", "mistakes"))


def test_weights_of_tags_resume_exactly_and_are_a_table_of_the_run(place):
    words = ["task.tag_weights={power: 1.0, window_steps: 4}", "loop.checkpoint_every_steps=2"]
    words = [*RUN, *words, "loop.total_steps=6", "lr_finder.enabled=false", "loop.batch_size=8"]
    check_resumption("train", words, place, killed_at=4, steps=6)
    table = read_table(place / "killed/tables/tag_weights.csv")
    assert table == read_table(place / "straight/tables/tag_weights.csv")
    assert len({row["weight"] for row in table}) > 1 and table[0]["tag"] == "general"
    assert open_task(place / "killed/weights/last_weights.safetensors").task._tag_rule is None


def test_a_weight_file_has_the_vocabulary_and_no_fact_of_training(place):
    path = place / "run/weights/best_weights.safetensors"
    tensors, metadata = read_weights(path)
    vocabulary = open_task(path).task.vocabulary
    assert vocabulary.names == ("general", "sensitive", "questionable", "explicit", "disc", "round", "square")
    assert read_vocabulary(place / "run") == vocabulary
    (place / "tags.csv").write_text((place / "run/selected_tags.csv").read_text().replace(",", ";"))
    assert read_vocabulary(place / "tags.csv") == vocabulary
    assert "dry run" in run("finetune", [*RUN, "task.vocabulary=run", "dry_run=true", "run_dir=x"], place)
    assert not {"orientation", "tag_priors"} & metadata.keys()
    # Orientation is the run's own, whatever a file says.
    forged = place / "forged.safetensors"
    write_weights(forged, tensors, {**metadata, "orientation": {"pairs": [[0, 999]]}, "tag_priors": [9.0]})
    assert open_task(forged).task.mirror is None


@pytest.mark.parametrize("name, value", [("tag_categories", [0]), ("tag_ids", [2**63] * 7)])
def test_a_strangers_vocabulary_is_refused_by_its_key(name, value, place):
    tensors, metadata = read_weights(place / "run/weights/best_weights.safetensors")
    path = place / "stranger.safetensors"
    write_weights(path, tensors, {**metadata, name: value})
    with refuses(rf"^{path}.*{name}"):
        open_task(path)


def test_what_is_wrong_is_named_by_its_key(place):
    with pytest.raises(ConfigError, match="augment.horizontal_flip: 0.5 would mirror images without their tags"):
        configure("finetune", [*RUN, "augment.horizontal_flip=0.5"])
    with refuses("^task.rating_s: null"):
        run("finetune", [*RUN, "task.rating_s=null", "run_dir=unwritten"], place)
    with refuses("^task.vocabulary: "):
        run("finetune", [*RUN, "task.vocabulary=absent.csv", "run_dir=unwritten"], place)
    assert not (place / "unwritten").exists()
