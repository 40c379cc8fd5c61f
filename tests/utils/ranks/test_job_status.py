"""The status of a job: noted by its ranks, judged where the launcher hides it."""

import pytest

from utils.errors import EXIT_CRASH, EXIT_LOST_RANK, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR
from utils.ranks.job_status import STATUS_VARIABLE, judge_status, note_status


@pytest.mark.parametrize(
    ("noted", "launcher", "judged"),
    [
        ([EXIT_STOPPED, EXIT_STOPPED], EXIT_CRASH, EXIT_STOPPED),  # torchrun ends with 1
        ([EXIT_LOST_RANK], EXIT_CRASH, EXIT_LOST_RANK),  # the other rank was killed and has noted nothing
        ([EXIT_LOST_RANK, EXIT_CRASH], EXIT_LOST_RANK, EXIT_CRASH),  # the other rank has failed
        ([EXIT_LOST_RANK, EXIT_USER_ERROR], EXIT_LOST_RANK, EXIT_USER_ERROR),
        ([EXIT_LOST_RANK, EXIT_STOPPED], EXIT_OK, EXIT_OK),  # torchrun has restarted the ranks
        ([EXIT_LOST_RANK, 134], EXIT_LOST_RANK, 134),  # no status of ours, but a failure
        ([], 126, 126),
    ],
)
def test_the_rank_that_fails_is_worth_more_than_those_that_miss_it(noted, launcher, judged, tmp_path, monkeypatch):
    monkeypatch.setenv(STATUS_VARIABLE, str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", str(len(noted)))
    for rank, status in enumerate(noted):
        monkeypatch.setenv("RANK", str(rank))
        note_status(status)
    (tmp_path / "9").write_text("")  # damaged, and being written
    (tmp_path / ".1.77.tmp").write_text(str(EXIT_USER_ERROR))
    assert judge_status(tmp_path, launcher) == judged
