"""Early stopping: when an evaluation is too long after the best one, the run is complete, and stays so."""

from engine.task import Report
from engine.tasks.classification import ClassificationTask
from tests.in_process import SHORT, SMALL_MODEL, make_images, run, run_until_killed
from tests.support import logged, rows
from utils.io.files import read_json


def test_a_run_stops_early_and_is_complete(tmp_path, monkeypatch, capsys):
    """At a rate of zero nothing gets better after the first evaluation. A longer patience goes on."""
    drawn = []
    monkeypatch.setattr("utils.record.plots.plot_curves", lambda rows, path, title: drawn.append(rows[-1]["step"]))
    images = make_images(tmp_path / "images")
    command = [
        *SMALL_MODEL, *SHORT, "data=image_folder", f"data.root={images}", f"run_dir={tmp_path}/run", "optim.lr=0.0",
        "loop.total_steps=20", "loop.evaluate_every_epochs=0.5", "loop.checkpoint_every_steps=100",
        "loop.log_every_steps=50",
    ]  # fmt: skip
    run("finetune", [*command, "loop.early_stop_epochs=2.0"], tmp_path)  # two steps an epoch
    assert "stopped early by loop.early_stop_epochs: 5 steps" in capsys.readouterr().err
    assert logged(tmp_path / "run", "evaluate", "step") == [1, 2, 3, 4, 5]
    assert rows(tmp_path / "run/metrics.jsonl", "epoch")[-1]["step"] == 5
    assert logged(tmp_path / "run", "train", "step")[-1] == 5  # of what was not logged yet
    assert drawn[-1] == 5  # the curves end where the run does
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000005"]
    run("finetune", [*command, "loop.early_stop_epochs=2.0"], tmp_path)
    assert "the run is complete: 5 of 20 steps are done" in capsys.readouterr().err
    run("finetune", [*command, "loop.early_stop_epochs=3.0"], tmp_path)
    assert logged(tmp_path / "run", "evaluate", "step") == [1, 2, 3, 4, 5, 6, 7]


def test_gains_below_the_least_one_add_up(tmp_path, monkeypatch):
    """Figures of 0.1, 0.2 and so on: with a least gain of 0.25, the fourth counts; in a resumed run, too."""

    def evaluate(self, loaders, step):
        return Report({"loss": 1.0, "top1": step / 10})

    monkeypatch.setattr(ClassificationTask, "evaluate", evaluate)
    images = make_images(tmp_path / "images")
    command = [
        *SMALL_MODEL, *SHORT, "data=image_folder", f"data.root={images}", "loop.total_steps=9",
        "loop.evaluate_every_epochs=0.5", "loop.early_stop_least=0.25",
    ]  # fmt: skip
    for patience, last in (("1.5", 9), ("1.0", 3)):
        words = [*command, f"loop.early_stop_epochs={patience}", f"run_dir={tmp_path}/{patience}"]
        if last > 6:
            run_until_killed("finetune", words, tmp_path, 6)
        run("finetune", words, tmp_path)
        assert logged(tmp_path / patience, "evaluate", "step")[-1] == last
        assert read_json(tmp_path / patience / "result.json")["step"] == last
