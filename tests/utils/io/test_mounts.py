"""Network file systems are known by the mount that a path is on."""

from pathlib import Path

import pytest

from utils.io import mounts

LINES = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /data rw - nfs4 server:/data rw,vers=4.2
31 30 254:1 / /data/local rw - xfs /dev/vdb rw
32 22 0:41 / /my\\040disk rw shared:3 - fuse.sshfs me@host: rw
33 22 0:42 / /twice rw - cifs //server/share rw
34 33 0:43 / /twice rw - tmpfs tmpfs rw
35 22 0:44 / /ntfs rw - fuseblk /dev/sdc1 rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/cache", None), ("/data/cache", "nfs4"), ("/data", "nfs4"), ("/database", None),
        ("/data/local/cache", None), ("/my disk/cache", "fuse.sshfs"), ("/twice/cache", None), ("/ntfs/cache", None),
    ],
)  # fmt: skip
def test_the_mount_decides(path, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(mounts, "_MOUNTS", tmp_path / "mountinfo")
    assert mounts.network_file_system(Path(path)) is None  # a system without it
    (tmp_path / "mountinfo").write_text(LINES)
    assert mounts.network_file_system(Path(path)) == kind
