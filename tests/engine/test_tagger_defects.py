"""Defects of published taggers that no other test is of: validation images in training, dense targets and paths in the
workers.
"""

import pickle

import pytest

from engine.run import derive_plan, start_ranks
from engine.tasks.kinds import KINDS
from tests.in_process import SHORT, SMALL_MODEL, configure, make_images, working_in


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """The data of a tagger with two workers, and the plan of its run."""
    folder = tmp_path_factory.mktemp("defects")
    make_images(folder / "images")
    words = [*SMALL_MODEL, *SHORT, "task=tagging", "task.min_count=1", "data=image_folder", "data.root=images",
             "runtime.workers=2"]  # fmt: skip
    config, _ = configure("finetune", words)
    kind = KINDS["tagging"]
    with working_in(folder):
        runtime = start_ranks(config)
        data = kind.pipeline.open_training(config, runtime, folder / "run")
        found = kind.pipeline.streams(data, kind.set_up(config, data.collection), config)
        yield found, derive_plan(config, found)


def test_no_validation_image_is_trained_on_with_workers(streams):
    found, plan = streams
    steps = found.train.steps(0, plan)
    trained = {int(one) for _ in range(6) for batch in next(steps) for one in batch["sample_id"]}
    steps.close()
    validated = {int(one) for batch in found.evaluation["val"] for one in batch["sample_id"]}
    assert trained and validated and not trained & validated


def test_tags_travel_as_ids_and_workers_get_no_paths(streams):
    found, plan = streams
    steps = found.train.steps(0, plan)
    (batch, *_), reader = next(steps), found.train.loader.reader
    steps.close()
    assert batch["tags"].ndim == 1 and len(batch["tags_offsets"]) == len(batch["sample_id"]) + 1
    assert len(pickle.dumps(reader.fields)) < 2000 and b".png" not in pickle.dumps(reader)
