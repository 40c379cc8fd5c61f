"""A sweep under torchrun."""

from tests.support import ROOT, command, common


def test_a_multirun_under_torchrun_starts_each_job_on_all_ranks(collection, tmp_path):
    """Two ranks, two jobs: the second meets anew in torchrun's store."""
    words = ["loop.total_steps=2", "loop.batch_size=4", "optim.lr=0.001,0.002", "--multirun"]
    common_words = common("classification", collection, tmp_path / "sweep")
    words += [text for text in common_words if not text.startswith("optim.lr")]
    done = command("torchrun", "--standalone", "--nproc_per_node=2", ROOT / "finetune.py", *words, cwd=tmp_path)
    assert done.stderr.count("2 ranks, each CPU") == 2
    assert sorted(path.parent.name for path in (tmp_path / "sweep").glob("*/weights")) == ["lr=0.001", "lr=0.002"]
    table = done.stderr[done.stderr.rindex("\nsettings ") :].splitlines()[2:4]
    assert {line.split()[0] for line in table} == {"optim.lr=0.001", "optim.lr=0.002"}
