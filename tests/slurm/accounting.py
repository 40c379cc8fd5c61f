"""Accounting for a cluster of tests: slurmdbd and a MariaDB of its own, on a socket in the cluster's folder.

It needs Debian's slurmdbd and mariadb-server (`make test-slurm` installs them).
"""

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb-admin", "mariadb", "sacctmgr")
_START_SEC = 60.0

# The connection to slurmdbd takes its munge socket from AccountingStoragePass, not from AuthInfo.
STORAGE = """\
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/run/munge.sock
AccountingStorageEnforce=associations,limits,qos
"""
DAEMON = """\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
CommunicationParameters=NoInAddrAny
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""


@dataclass
class Accounting:
    """The database of a cluster whose files are in `folder`; `port`: of slurmdbd, a free one."""

    folder: Path
    port: int
    cluster: str

    @property
    def lines(self) -> str:
        """Return what slurm.conf says of it."""
        return STORAGE.format(folder=self.folder, port=self.port)

    def start(self, environment: dict[str, str]) -> None:
        """Start both daemons; munge must run. Then make the account `vision`, with this user in it."""
        socket, run, log = self.folder / "run/mariadb.sock", self.folder / "run", self.folder / "log"
        data = self.folder / "db"
        environment = {**environment, "MYSQL_UNIX_PORT": str(socket)}
        call(
            environment, "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}",
            "--auth-root-authentication-method=normal", "--skip-test-db",
        )  # fmt: skip
        with open(log / "mariadbd.log", "wb") as output:
            subprocess.Popen(
                ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={socket}",
                 "--skip-networking", f"--pid-file={run}/mariadbd.pid", "--innodb-buffer-pool-size=64M",
                 "--innodb-lock-wait-timeout=900", "--performance-schema=OFF", "--skip-log-bin"],
                env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        client = ("--no-defaults", "-uroot", "-S", str(socket))
        wait_for(environment, "mariadb-admin", *client, "ping")
        call(environment, "mariadb", *client, "-e", "create database slurm_acct_db")
        file = self.folder / "slurmdbd.conf"
        file.write_text(DAEMON.format(folder=self.folder, port=self.port))
        file.chmod(0o600)
        call(environment, "slurmdbd")
        wait_for(environment, "sacctmgr", "--noheader", "show", "cluster")
        for words in (
            ("cluster", self.cluster), ("account", "vision", "Description=tests", "Organization=tests"),
            ("user", "root", "Account=vision", "AdminLevel=Admin"),
        ):  # fmt: skip
            call(environment, "sacctmgr", "--immediate", "add", *words)


def call(environment: dict[str, str], *command: str) -> None:
    """Run a command. Raises RuntimeError with what it says where it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


def wait_for(environment: dict[str, str], *command: str) -> None:
    """Run a command until it succeeds."""
    until = time.monotonic() + _START_SEC
    while True:
        try:
            return call(environment, *command)
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def missing_programs() -> list[str]:
    """Return what is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]
