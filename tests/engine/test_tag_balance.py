"""task.tag_weights.reestimate_steps: what is counted and how it weighs, in a literal case. Runs: slow_diffusion.py."""

import copy

import pytest
import torch

pytest.importorskip("diffusers", reason="make install-sdxl")

from data.tags.tag_weights import TagWeightsConfig
from engine.tasks.diffusion import TagBalance
from tests.engine.test_diffusion import RESUMED, SHORT
from tests.engine.test_no_host_sync import count
from tests.in_process import run_command
from tests.support import make_collection

RULE = {"power": 1.0, "low": 0.1, "high": 4.0, "factors": {}}
FACTS = {"counts": [4, 4, 4, 4], "factors": [1.0, 1.0, 1.0, 0.0], "shares": [0.25, 0.25, 0.5, 0.0]}
OWN = [*SHORT, *RESUMED, "data.root=images", "loop.batch_size=12", "loop.micro_batch_size=6", "task.chunk=6"]
WEIGHTS = "task.tag_weights={power: 1.0, low: 0.1, high: 4.0, factors: {}, reestimate_steps: 2}"


def test_tags_weigh_anew_by_what_was_shown():
    """Sample 0 shows tag 0 of its tags 0 and 3; sample 1 tags 1 and 2; 2 cannot be read; 3 has no tag."""
    balance = TagBalance(TagWeightsConfig(**RULE, reestimate_steps=2), FACTS)
    batch = {
        "tags": torch.tensor([0, 3, 1, 2, 2]),
        "tags_offsets": torch.tensor([0, 2, 4, 5, 5]),
        "shown_tags": torch.tensor([0, 1, 2, 2]),
        "shown_tags_offsets": torch.tensor([0, 1, 3, 4, 4]),
        "weight": torch.tensor([1.0, 1.0, 0.0, 1.0]),
    }
    assert balance.weights.tolist() == [1.0, 1.0, 1.0, 0.0] and balance(batch).tolist() == [1.0] * 4
    balance.after_step(0)
    assert balance.shown.tolist() == [1, 1, 1, 0] and balance.weights[0] == 1
    again = copy.deepcopy(balance)
    assert count(lambda: (again(batch), again.after_step(2))) == []  # not due, so the host does not wait
    balance({**batch, "shown_tags": torch.tensor([0, 2]), "shown_tags_offsets": torch.tensor([0, 1, 1, 2, 2])})
    balance.after_step(1)
    assert balance.shown.tolist() == [2, 1, 1, 0] and balance.pending.tolist() == [0] * 4
    # The median is 1: weights 1/2, 1, 1; their mean over the images 0.25 * 0.5 + 0.25 + 0.5 = 0.875.
    assert balance.weights.tolist() == pytest.approx([0.5 / 0.875, 1 / 0.875, 1 / 0.875, 0.0])
    assert balance(batch).tolist() == pytest.approx([0.5 / 0.875, 1 / 0.875, 1 / 0.875, 1.0])
    still = TagBalance(TagWeightsConfig(**RULE, reestimate_steps=None), FACTS)
    still(batch)
    still.after_step(1)
    assert still.weights.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    make_collection(tmp_path / "prose", per_class=4, validation=1)
    texts = [(file, file.with_suffix(".json")) for file in (tmp_path / "prose").rglob("*.txt")]
    for text, sidecar in texts:
        sidecar.write_text('{"caption": "A shape on grey.", "tags": ["circle", "red"]}')
        text.unlink()
    said = [*OWN, WEIGHTS, "data.root=prose", "run_dir=refused"]
    assert run_command("finetune_sdxl", said, tmp_path, monkeypatch) == 2
    assert "task.tag_weights.reestimate_steps: 2" in capsys.readouterr().err
