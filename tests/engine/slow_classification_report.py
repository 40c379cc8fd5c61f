"""What evaluation says of a classifier is the same on one, two and three ranks."""

import math
import multiprocessing
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.engine.test_classification_report import make_batch, make_task
from tests.support import free_port


def _be_rank(rank, ranks, port, path):
    """Evaluate a rank's share, in batches of three with a padded last one, and write what it found."""
    if ranks > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", address, timedelta(seconds=60), world_size=ranks, rank=rank)
    logits = torch.randn(101, 60, generator=torch.Generator().manual_seed(3))
    logits[40:60] = logits[40]  # ties, which any number of ranks must break alike
    batches, mine = [], list(range(rank, 101, ranks))
    for start in range(0, math.ceil(101 / ranks), 3):
        ids = mine[start : start + 3]
        padded, weight = ids + [0] * (3 - len(ids)), [1.0] * len(ids) + [0.0] * (3 - len(ids))
        batches.append(make_batch(padded, [number % 50 for number in padded], weight))
    with torch.inference_mode():
        report = make_task(logits, [f"c{number}" for number in range(60)]).evaluate({"val": batches}, 0)
    images = {name: image.tobytes() for name, image in report.images.items()}
    path.with_name(f"{path.name}_{rank}").write_bytes(pickle.dumps((report.scalars, report.tables, images)))
    if ranks > 1:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_tables_and_pictures_are_the_same_on_one_two_and_three_ranks(tmp_path):
    forks = multiprocessing.get_context("forkserver")
    found = {}
    for ranks in (1, 2, 3):
        shared = (ranks, free_port(), tmp_path / f"of_{ranks}")
        processes = [forks.Process(target=_be_rank, args=(rank, *shared)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * ranks
        found[ranks] = [pickle.loads((tmp_path / f"of_{ranks}_{rank}").read_bytes()) for rank in range(ranks)]
    scalars, tables, images = found[1][0]
    assert scalars["samples"] == 101 and sum(row["samples"] for row in tables["classes"]) == 101
    assert set(images) == {"confusion", "mistakes", "predictions"}
    for ranks in (2, 3):
        first, *others = found[ranks]
        assert first[0] == pytest.approx(scalars, rel=1e-12)
        assert first[1:] == (tables, images)
        assert all(other == (first[0], {}, {}) for other in others)
