"""The table of a sweep, from run folders: groups over seeds, order, what has no value yet."""

from utils.io.files import write_json
from utils.record.sweep_table import SweptRun, main, sweep_table


def make_run(folder, overrides, value=None, *, complete=True, is_lowest_best=False):
    folder.mkdir(parents=True)
    (folder / "overrides.txt").write_text("".join(f"{text}\n" for text in [*overrides, f"run_dir={folder}"]))
    if complete:
        write_json(folder / "complete.json", {"step": 4})
    if value is not None:
        values = {"metric": "top1", "value": value, "step": 4, "is_lowest_best": is_lowest_best}
        write_json(folder / "result.json", values)


def test_the_table_of_a_sweep(tmp_path, capsys):
    for number, (rate, seed, value, complete) in enumerate([
        ("0.1", 0, 0.5, True), ("0.1", 1, 0.7, True), ("0.2", 0, 0.65, True), ("0.2", 1, None, False),
    ]):  # fmt: skip
        words = ["model=convnextv2_atto", f"optim.lr={rate}", f"seed={seed}", "sweep.name=rates"]
        make_run(tmp_path / str(number), words, value, complete=complete)
    assert main(str(tmp_path)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "settings      runs  top1    least to greatest  state",
        "optim.lr=0.2  2     0.6500  -                  finished, stopped",
        "optim.lr=0.1  2     0.6000  0.5000 to 0.7000   finished",
    ]


def test_what_is_best_is_first_and_what_has_no_value_last():
    for lowest, order in ((False, ["3", "2", "1", "4"]), (True, ["1", "2", "3", "4"])):
        values = {"1": 0.1, "4": None, "3": 0.3, "2": 0.2}
        runs = [
            SweptRun(frozenset([rate]), "finished", {"metric": "m", "value": value, "is_lowest_best": lowest})
            for rate, value in values.items()
        ]
        assert [line.split()[0][-1] for line in sweep_table(runs).splitlines()[1:]] == order


def test_a_folder_without_jobs_is_refused(tmp_path, capsys):
    assert main(str(tmp_path)) == 2
    assert f"sweep_table: {tmp_path} holds no job of a sweep; give outputs/sweeps/NAME" in capsys.readouterr().err
