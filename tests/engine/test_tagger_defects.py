"""Defects of an earlier tagger, each of which is a test here or elsewhere.

| defect | test |
|---|---|
| validation images in training, with workers | here |
| F1 at a fixed threshold chose the weights | test_tagging.py |
| mAP in bins, its memory; figures that change with the batches | test_tag_measures.py |
| three sources of thresholds, and a file that is none | test_tag_measures.py, tests/models/test_tag_exports.py |
| another filter in serving than in training | tests/data/test_transforms.py, tests/models/test_wd14_tools.py |
| flips that repeat from epoch to epoch | here |
| a lost rating `s`; tags split in another way than documented | tests/data/test_tag_index.py, test_tag_readers.py |
| outputs for padding and unknown tags; no categories; a moved column | tests/data/test_tag_index.py |
| an ONNX file that no tool reads | tests/models/test_wd14_tools.py |
| dense int64 targets from the workers; paths pickled into each of them | here |
| overrides that nothing reads | tests/conf/test_no_dead_key.py |
| clamped logits without a gradient; signs and clip of ASL | test_tag_losses.py |
| the folder walked at each start | tests/data/test_tag_index.py |
| no split by id; near-duplicates in both splits | tests/data/test_split_by_id.py, test_duplicates.py |
| a stale schedule after the collection has changed | tests/engine/test_resume.py |
"""

import pickle

import numpy as np
import pytest
import torch

from data.tags.mirror import Mirror
from engine.run import derive_plan, start_ranks
from engine.tasks.kinds import KINDS
from tests.in_process import SHORT, SMALL_MODEL, configure, make_images, working_in
from utils import rng


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
    (batch, *_), reader = next(steps), found.train.reader
    steps.close()
    assert batch["tags"].ndim == 1 and len(batch["tags_offsets"]) == len(batch["sample_id"]) + 1
    assert len(pickle.dumps(reader.fields)) < 2000 and b".png" not in pickle.dumps(reader)


def test_mirrored_images_of_two_epochs_are_independent():
    """Of 4,000 images a quarter is mirrored in both epochs; with a coin of a checksum it was all or none."""
    mirror = Mirror({"pairs": [], "dropped": [], "no_flip": []}, 1)
    images = torch.zeros(4000, 1, 1, 2, dtype=torch.uint8)
    images[..., 1] = 1
    turned = []
    for epoch in range(2):
        keys = torch.tensor([rng.sample_key(0, epoch * 4000 + row) for row in range(4000)])
        turned.append(mirror(images, torch.zeros(4000, 1), None, keys)[0][:, 0, 0, 0].numpy().astype(bool))
    assert [float(np.mean(one)) for one in turned] == pytest.approx([0.5, 0.5], abs=0.04)
    assert float(np.mean(turned[0] & turned[1])) == pytest.approx(0.25, abs=0.04)
