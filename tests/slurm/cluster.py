"""A real SLURM on this machine, for tests and for trying: slurmctld, a slurmd for each node, munge, all on loopback.

    python -m tests.slurm.cluster start FOLDER       prints the line that makes sbatch find it
    python -m tests.slurm.cluster stop FOLDER

It needs root, and Debian's packages slurm-wlm and munge (`make test-slurm` installs them). The nodes n1, n2, ... have
four CPUs each, and all of them are this machine. Jobs in the partition `low` give way to those
in `main`: they are signalled, and requeued after a grace time. Nothing under /etc is changed but the names of the nodes
in /etc/hosts, which `stop` takes away.
"""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CPUS, MEMORY_MIB, GRACE_SEC = 4, 8000, 10
PROGRAMS = ("slurmctld", "slurmd", "munged", "sinfo", "sbatch")
_START_SEC = 240.0

# `cred_expire` is what a requeued job waits before it may start again, 120 s by default. Without
# preempt_send_user_signal a preempted job gets SIGTERM only. SlurmdTimeout, how long a node may be silent, outlasts a
# pause of this machine; `lose_node` tells SLURM at once.
CONFIG = """\
ClusterName=atelier
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/state/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
EnforcePartLimits=ALL
JobRequeue=1
KillWait=5
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=120
ReturnToService=2
MaxArraySize=1001
FirstJobId={first_job}
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes={names} Default=NO MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
"""


class ClusterError(RuntimeError):
    """SLURM did not start, or is not installed."""


@dataclass
class Cluster:
    """A cluster whose files are in `folder`; `port`: the first of nodes + 1 free ones."""

    folder: Path
    nodes: int = 2
    port: int = 30817
    prefix: str = "n"  # of the nodes' names: two clusters of one machine share /etc/hosts

    @property
    def names(self):
        return [f"{self.prefix}{number}" for number in range(1, self.nodes + 1)]

    @property
    def environment(self):
        """Return the variables with which SLURM's commands find the cluster, and no job's."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        }
        return {**kept, "PATH": f"{kept['PATH']}:/usr/sbin:/sbin", "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self):
        """Start all daemons and wait for the nodes. Raises ClusterError with what is missing or the end of the logs."""
        if missing := why_impossible():
            raise ClusterError(missing)
        self._write_files()
        self._name_the_nodes(self.names)
        run, log, munge = (self.folder / name for name in ("run", "log", "munge"))
        self._run(
            "munged", "--force", f"--socket={run}/munge.sock", f"--key-file={munge}/munge.key",
            f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log", f"--seed-file={munge}/munge.seed",
        )  # fmt: skip
        self._run("slurmctld")
        for name in self.names:
            self.start_node(name)
        until = time.monotonic() + _START_SEC
        while self._count_ready() < self.nodes:
            if time.monotonic() > until:
                raise ClusterError(f"SLURM did not come up; see {log}\n{self._ends_of_logs()}")
            time.sleep(0.2)

    def stop(self):
        """End jobs and daemons, and take the nodes' names away again."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=60)
        time.sleep(0.5)
        for daemon in (*(f"slurmd-{name}" for name in self.names), "slurmctld", "munged"):
            self._kill(daemon, signal.SIGTERM)
        self._name_the_nodes([])

    def start_node(self, name):
        self._run("slurmd", "-N", name)

    def kill_node(self, name):
        """Kill the daemon of a node and all that it runs, as a loss of power does: SLURM's own part hears nothing."""
        ours, parents = [], set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if f"SLURMD_NODENAME={name}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    ours.append(int(process.name))
                    parents.add(int((process / "stat").read_text().rpartition(")")[2].split()[1]))
        steps = [pid for pid in parents if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"slurmstepd")]
        self._kill(f"slurmd-{name}", signal.SIGKILL)
        for process in (*steps, *ours):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def lose_node(self, name):
        """Kill a node, and let SLURM notice it now."""
        self.kill_node(name)
        self._run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed")

    # ------------------------------------------------------------------------------------------------------- the parts

    @property
    def _mark(self):
        return f"# SLURM of {self.folder}"

    def _write_files(self):
        for name in ("log", "state", "run", "munge", *(f"state/{name}" for name in self.names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "munge").chmod(0o700)
        key = self.folder / "munge/munge.key"
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.port + number} CPUs={CPUS} "
            f"RealMemory={MEMORY_MIB} State=UNKNOWN"
            for number, name in enumerate(self.names, start=1)
        )
        # Jobs are not numbered from 1 again: submitit would read the results of an older cluster's job.
        first = int(time.time()) // 10 % 60_000_000 + 1
        names = f"{self.prefix}[1-{self.nodes}]"
        text = CONFIG.format(
            host=host, port=self.port, folder=self.folder, first_job=first, nodes=nodes, names=names, grace=GRACE_SEC
        )
        (self.folder / "slurm.conf").write_text(text)

    def _name_the_nodes(self, names):
        """Name these nodes of this cluster in /etc/hosts, and no others; another cluster may be doing the same."""
        with open(Path("/etc/hosts"), "r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            kept = [line for line in stream.read().splitlines() if not line.endswith(self._mark)]
            lines = [*kept, *(f"127.0.0.1 {name} {self._mark}" for name in names)]
            stream.seek(0)
            stream.truncate()  # in place: a container mounts the file
            stream.write("\n".join(lines) + "\n")

    def _run(self, *command):
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")

    def _count_ready(self):
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %T"], env=self.environment, capture_output=True, text=True
        )
        ready = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(("idle", "mixed", "allocated"))}
        return len(ready)

    def _kill(self, daemon, number):
        file = self.folder / f"run/{daemon}.pid"
        if not file.exists():
            return
        pid = int(file.read_text())
        try:
            os.kill(pid, number)
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        file.unlink(missing_ok=True)

    def _ends_of_logs(self):
        return "\n".join(file.read_text(errors="replace")[-1000:] for file in sorted((self.folder / "log").iterdir()))


def why_impossible():
    """Return why no cluster can be started here, None where one can."""
    if os.geteuid() != 0:
        return "a cluster of one's own needs root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not found; apt-get install --no-install-recommends slurm-wlm munge"
    return None


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        sys.exit("python -m tests.slurm.cluster start|stop FOLDER")
    cluster = Cluster(Path(sys.argv[2]).absolute())
    try:
        cluster.start() if sys.argv[1] == "start" else cluster.stop()
    except ClusterError as error:
        sys.exit(f"cluster: {error}")
    if sys.argv[1] == "start":
        sys.stdout.write(f"export SLURM_CONF={cluster.folder}/slurm.conf\n")


if __name__ == "__main__":
    main()
