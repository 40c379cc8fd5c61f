"""What kind of file system a path is on."""

import os
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")  # of Linux
_NETWORK = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "lustre"),
    *("ncpfs", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs"),
)


def network_file_system(path: Path) -> str | None:
    """Return the type of the network file system that a path is on or would be made on, None where it is on none.

    What FUSE programs mount (sshfs, s3fs) counts as one. Systems without /proc are not looked at.
    Source: proc_pid_mountinfo(5).
    """
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    real, depth, found = Path(os.path.realpath(path)), 0, ""
    for line in lines:
        mount, _, rest = line.partition(" - ")
        point = Path(mount.split(" ")[4].encode("latin-1", "replace").decode("unicode_escape"))
        if real.is_relative_to(point) and len(point.parts) >= depth:  # a later mount hides one at the same place
            depth, found = len(point.parts), rest.split(" ")[0]
    return found if found in _NETWORK or found.startswith("fuse.") else None
