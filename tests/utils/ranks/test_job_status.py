"""The status of a job: noted by its ranks, judged where the launcher hides it."""

import pytest

from utils.errors import EXIT_CRASH, EXIT_LOST_RANK, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR
from utils.ranks.job_status import STATUS_VARIABLE, judge_status, note_status, note_task, some_rank_failed


@pytest.mark.parametrize(
    ("noted", "launcher", "judged"),
    [
        ([EXIT_STOPPED, EXIT_STOPPED], EXIT_CRASH, EXIT_STOPPED),  # torchrun ends with 1
        ([EXIT_LOST_RANK], EXIT_CRASH, EXIT_LOST_RANK),  # the other rank was killed and has noted nothing
        ([EXIT_LOST_RANK, EXIT_CRASH], EXIT_LOST_RANK, EXIT_CRASH),  # the other rank has failed
        ([EXIT_LOST_RANK, EXIT_USER_ERROR], EXIT_LOST_RANK, EXIT_USER_ERROR),
        ([EXIT_LOST_RANK, EXIT_STOPPED], EXIT_OK, EXIT_OK),  # torchrun has restarted the ranks
        ([EXIT_LOST_RANK, 134], EXIT_LOST_RANK, 134),  # no status of ours, but a failure
        ([], -9, -9),
    ],
)
def test_the_rank_that_fails_is_worth_more_than_those_that_miss_it(noted, launcher, judged, tmp_path, monkeypatch):
    monkeypatch.setenv(STATUS_VARIABLE, str(tmp_path / "status"))
    monkeypatch.setenv("WORLD_SIZE", str(len(noted)))
    for rank, status in enumerate(noted):
        monkeypatch.setenv("RANK", str(rank))
        note_status(status)
    assert judge_status(tmp_path / "status", launcher) == judged


def test_a_damaged_note_and_one_that_is_being_written_count_for_nothing(tmp_path):
    (tmp_path / "0").write_text("")
    (tmp_path / ".1.77.tmp").write_text(str(EXIT_USER_ERROR))
    assert judge_status(tmp_path, EXIT_CRASH) == EXIT_CRASH and not some_rank_failed(tmp_path)


def test_a_task_whose_ranks_could_note_nothing_has_failed(tmp_path):
    note_task(tmp_path / "status", 1, EXIT_STOPPED)
    assert not some_rank_failed(tmp_path / "status")
    note_task(tmp_path / "status", 0, 126)
    assert some_rank_failed(tmp_path / "status") and judge_status(tmp_path / "status", EXIT_LOST_RANK) == 126


def test_without_a_job_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.delenv(STATUS_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    note_status(EXIT_STOPPED)
    assert not list(tmp_path.iterdir())
