"""A SLURM cluster on a laboratory's nodes: munge, slurmctld on the head, a slurmd on each node."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.jobs.laboratory import HEAD, HEAD_ADDRESS, CannotHaveIt, Laboratory, wait_until

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged")
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

# No systemd and no cgroups; reactions in seconds where a site would wait minutes. cred_expire is what a requeued job waits for.
# Time-outs are long, as a busy machine makes live nodes slow: tests declare a node down themselves.
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=head({head})
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={socket},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,requeue_setup_env_fail
SlurmdTimeout=300
MessageTimeout=30
TCPTimeout=5
KillWait=5
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
LaunchParameters=send_gids
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""


class Slurm:
    """As a context, on a laboratory that is up. `environment`: what users' commands are run with."""

    def __init__(self, laboratory: Laboratory, cpus: int = 2) -> None:
        self.laboratory, self.cpus = laboratory, cpus
        self.folder = laboratory.directory / "slurm"
        settings = {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.environment = {**os.environ, **settings}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Slurm:
        absent = [program for program in PROGRAMS if shutil.which(program) is None]
        if absent:
            raise CannotHaveIt(f"{', '.join(absent)} not found: apt-get install --no-install-recommends slurm-wlm munge")
        # munge wants every folder above its socket open to all, which a test's own folder is not
        self._socket_folder = Path(tempfile.mkdtemp(prefix="lab-munge-", dir="/var/tmp"))
        self._socket_folder.chmod(0o711)
        self._configure()
        try:
            self._start_munge()
            self._daemons["slurmctld"] = self._start(HEAD, "slurmctld", "-D")
            for node in self.laboratory.nodes:
                self.start_node(node)
            states = ["idle"] * len(self.laboratory.nodes)
            wait_until(lambda: self.states() == states, "all nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self._socket_folder, ignore_errors=True)

    # ---- what users do ------------------------------------------------------------------------------------------------------

    def call(self, *command: object, timeout: float = 240, environment: Mapping[str, str] | None = None) -> str:
        """What a command prints that is run on the login node, from the current folder. Raises CalledProcessError."""
        moved = ("env", f"--chdir={os.getcwd()}", *command)
        return self.laboratory.run(HEAD, *moved, timeout=timeout, environment={**self.environment, **(environment or {})})

    def submit(self, *command: object, environment: Mapping[str, str] | None = None) -> str:
        """`sbatch` these arguments from the project's root; the job's number."""
        return self.call("sbatch", "--parsable", f"--chdir={ROOT}", *command, environment=environment).partition(";")[0].strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "-o", number)))

    def wait(self, number: str, seconds: float = 120) -> dict[str, str]:
        """A job's facts when it has ended."""
        wait_until(lambda: self.job(number)["JobState"] in ENDED, f"job {number} has ended", seconds, pause=0.5)
        return self.job(number)

    # ---- what fate does -----------------------------------------------------------------------------------------------------

    def states(self, node: str = "ALL") -> list[str]:
        """The state of each node, without SLURM's marks."""
        chosen = () if node == "ALL" else ("-n", node)
        return [state.rstrip("*~#$@+") for state in self.call("sinfo", "-h", "-N", *chosen, "-o", "%T").split()]

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, on a node that is on."""
        self._daemons[node] = self._start(node, "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """Power-off; the operator declares the node down at once, instead of SLURM after its time-out."""
        self.laboratory.power_off(node)
        self._daemons.pop(node).wait()
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def repair_node(self, node: str) -> None:
        """Power on, and wait until SLURM has the node back."""
        self.laboratory.power_on(node)
        self.start_node(node)
        wait_until(lambda: self.states(node) == ["idle"], f"node {node} is back")

    def restore(self) -> None:
        """No jobs, and all nodes are back."""
        self.call("scancel", "--user=root")
        for node in self.laboratory.nodes:
            if node not in self._daemons:
                self.repair_node(node)
            self.laboratory.join(node)
        try:
            wait_until(lambda: set(self.states()) == {"idle"}, "all nodes are idle", 120, pause=0.2)
        except AssertionError as error:
            error.add_note(self.call("sinfo", "-N", "-o", "%N %T %E") + self.call("squeue"))
            raise

    def _configure(self) -> None:
        self.folder.mkdir()
        facts = {"head": HEAD_ADDRESS, "user": "root", "socket": self._socket_folder / "munge", "folder": self.folder}
        lines = [CONFIGURATION.format(**facts)]
        for node in self.laboratory.nodes:
            for kind in ("spool", "tmp"):
                (self.folder / f"{kind}-{node}").mkdir()
            place = f"NodeHostname={node} NodeAddr={self.laboratory.addresses[node]}"
            lines.append(f"NodeName={node} {place} CPUs={self.cpus} RealMemory=2000 State=UNKNOWN\n")
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text("".join(lines))

    def _start_munge(self) -> None:
        keys = self.folder / "key"
        keys.mkdir(mode=0o700)
        (keys / "munge.key").write_bytes(secrets.token_bytes(128))
        (keys / "munge.key").chmod(0o600)
        socket = self._socket_folder / "munge"
        files = {"key": keys / "munge.key", "pid": keys / "pid", "log": self.folder / "munged.log", "seed": keys / "seed"}
        options = [f"--{name}-file={path}" for name, path in files.items()]
        self._daemons["munged"] = self._start(HEAD, "munged", "-F", f"--socket={socket}", *options)
        wait_until(socket.exists, "munge has its socket")

    def _start(self, name: str, *command: object) -> subprocess.Popen:
        log = self.folder / f"{command[0]}-{name}.out"
        return self.laboratory.start(name, *command, log=log, environment=self.environment)
