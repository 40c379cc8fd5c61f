"""task.tag_weights.reestimate_steps: what is counted and how it weighs, in a literal case and in runs."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from data.tag_weights import TagWeightsConfig
from engine.tasks.diffusion import TagBalance
from tests.engine.test_diffusion import RESUMED, SHORT, assert_equal_runs
from tests.engine.test_no_host_sync import count
from tests.in_process import run, run_command, run_until_killed
from tests.support import checkpoint_tensors, make_collection, rows

RULE = {"power": 1.0, "low": 0.1, "high": 4.0, "factors": {}}
FACTS = {"counts": [4, 4, 4, 4], "factors": [1.0, 1.0, 1.0, 0.0], "shares": [0.25, 0.25, 0.5, 0.0]}
OWN = [*SHORT, *RESUMED, "data.root=images", "loop.global_batch_size=12", "loop.batch_size=6", "task.chunk=6"]
WEIGHTS = "task.tag_weights={power: 1.0, low: 0.1, high: 4.0, factors: {}, reestimate_steps: 2}"


def test_tags_weigh_anew_by_what_was_shown():
    """Sample 0 shows tag 0 of its tags 0 and 3; sample 1 tags 1 and 2; 2 cannot be read; 3 has no tag."""
    balance = TagBalance(TagWeightsConfig(**RULE, reestimate_steps=2), FACTS)
    batch = {
        "tags": torch.tensor([0, 3, 1, 2, 2]),
        "tags_offsets": torch.tensor([0, 2, 4, 5, 5]),
        "tags_shown": torch.tensor([True, False, True, True, True]),
        "weight": torch.tensor([1.0, 1.0, 0.0, 1.0]),
    }
    assert balance.weights.tolist() == [1.0, 1.0, 1.0, 0.0] and balance(batch).tolist() == [1.0] * 4
    balance.after_step(0)
    assert balance.shown.tolist() == [1, 1, 1, 0] and balance.weights[0] == 1
    again = copy.deepcopy(balance)
    assert count(lambda: (again(batch), again.after_step(2))) == []  # not due, so the host does not wait
    balance({**batch, "tags_shown": torch.tensor([True, False, False, False, True])})
    balance.after_step(1)
    assert balance.shown.tolist() == [2, 1, 1, 0] and balance.pending.tolist() == [0] * 4
    # The median is 1: weights 1/2, 1, 1; their mean over the images 0.25 * 0.5 + 0.25 + 0.5 = 0.875.
    assert balance.weights.tolist() == pytest.approx([0.5 / 0.875, 1 / 0.875, 1 / 0.875, 0.0])
    assert balance(batch).tolist() == pytest.approx([0.5 / 0.875, 1 / 0.875, 1 / 0.875, 1.0])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("balance")
    make_collection(folder / "images")
    run("finetune_sdxl", [*OWN, WEIGHTS, "run_dir=straight"], folder)
    return folder


def test_a_run_weighs_anew_and_resumes_bit_for_bit_with_other_workers(place):
    state = {step: checkpoint_tensors(place / "straight", step) for step in (3, 6)}
    weights, shown = ("task/tag_balance.weights", "task/tag_balance.shown")
    assert not torch.equal(state[3][weights], state[6][weights]) and state[6][shown].sum() > state[3][shown].sum()
    shares = [row["effective_share"] for row in rows(place / "straight/metrics.jsonl", "train")]
    assert len(shares) == 6 and all(0.2 < share < 1 for share in shares[2:])
    killed = [*OWN, WEIGHTS, "run_dir=killed"]
    run_until_killed("finetune_sdxl", killed, place, step=5)  # of steps 3 to 6, the weights are those of step 2 and 4
    run("finetune_sdxl", [*killed, "runtime.workers=2", "runtime.prefetch_batches=3"], place)
    assert_equal_runs(place / "straight", place / "killed", 6)


def test_what_is_refused(place, monkeypatch, capsys):
    make_collection(place / "prose", per_class=4, validation=1)
    texts = [(file, file.with_suffix(".json")) for file in (place / "prose").rglob("*.txt")]
    for text, sidecar in texts:
        sidecar.write_text('{"caption": "A shape on grey.", "tags": ["circle", "red"]}')
        text.unlink()
    said = [*OWN, WEIGHTS, "data.root=prose", "run_dir=refused"]
    assert run_command("finetune_sdxl", said, place, monkeypatch) == 2
    assert "task.tag_weights.reestimate_steps: 2" in capsys.readouterr().err
