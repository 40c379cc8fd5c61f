"""A search by Optuna: the values of a sweep's jobs follow from the results of the jobs before.

What is swept is what Hydra's grammar has: `key=a,b` and `choice(a,b)`, `range(1,9)`, `interval(1e-4,1e-2)`, in
logarithms with `tag(log, ..)`. The state is in the sweep's folder (optuna.log), so a search that is typed again goes
on: trials that were under way are made again, with the same values and in the same run folders. With one job at once,
the same results lead to the same trials.
"""

from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from utils.config.sweep import Sweep, SweepJob
from utils.errors import UserError
from utils.record.run_reader import RunReader


class Search:
    """The trials of a sweep: `next_job` asks for one, `tell` gives its result back."""

    def __init__(self, sweep: Sweep) -> None:
        import optuna  # takes a second
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._optuna = sweep, optuna
        self._swept = [one for one in sweep.overrides if one.is_sweep_override()]
        if not self._swept:
            raise UserError("sweep.trials: nothing is swept; add a range, optim.lr=tag(log,interval(1e-4,1e-2))")
        file = Path(sweep.base) / "optuna.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(file)))
        self._study = optuna.create_study(
            storage=storage, study_name="sweep", direction="maximize", load_if_exists=True
        )
        for trial in self._study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):  # of a search that was killed
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            self._study.enqueue_trial(trial.params)
        # A search that goes on must not draw again what it drew at first.
        self._study.sampler = optuna.samplers.TPESampler(seed=len(self._study.trials))
        done = len(self._study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)))
        self._left, self._asked = sweep.trials - done, {}

    def next_job(self) -> SweepJob | None:
        """Return the next trial's job; None after the last.

        Trials may draw the same values, and so the same run folder. One whose job is under way gets that job's result.
        """
        while self._left > 0:
            self._left -= 1
            trial = self._study.ask()
            job = self._job_of(trial)
            self._asked.setdefault(job, []).append(trial)
            if len(self._asked[job]) == 1:
                return job
        return None

    def _job_of(self, trial: Any) -> SweepJob:
        chosen = {one.key_or_group: _suggest(trial, one) for one in self._swept}
        words = [
            f"{one.get_key_element()}={chosen[one.key_or_group]}" if one.is_sweep_override() else one.input_line
            for one in self._sweep.overrides
            if one.key_or_group != "run_dir"
        ]
        return self._sweep.job(words)

    def tell(self, job: SweepJob) -> None:
        """Take a job's result from its run folder; without one its trials have failed."""
        result = RunReader(Path(job.folder)).result
        for trial in self._asked.pop(job):
            if result is None or result["value"] is None:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._study.tell(trial, -result["value"] if result["is_lowest_best"] else result["value"])


def _suggest(trial: Any, override: Override) -> str | int | float:
    """Return the value of a swept key that a trial suggests."""
    name, sweep = override.key_or_group, override.value()
    if isinstance(sweep, IntervalSweep):
        if "int" in sweep.tags:
            return trial.suggest_int(name, int(sweep.start), int(sweep.end), log="log" in sweep.tags)
        value = trial.suggest_float(name, float(sweep.start), float(sweep.end), log="log" in sweep.tags)
        return float(f"{value:.4g}")  # readable; Optuna may know it to more digits
    if isinstance(sweep, RangeSweep):
        return trial.suggest_int(name, int(sweep.start), int(sweep.stop) - 1, step=int(sweep.step))
    return trial.suggest_categorical(name, list(override.sweep_string_iterator()))
