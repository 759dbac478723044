"""launch/slurm.sbatch on a real Slurm cluster: two nodes on this machine, with its own folders, ports and key."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import write_tiny_config

from lckv_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
pytestmark = pytest.mark.slow

# Stands in for the training of two tasks: each start saves a step or not, then ends as its CONFIG says.
TRAIN = """
import os, signal, sys, time
from pathlib import Path
first = os.environ["SLURM_PROCID"] == "0"
config, out = sys.argv[2], Path(sys.argv[3].removeprefix("out="))
start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
print(config, "start", start, flush=True)
if first and config != "stuck":
    (out / "checkpoints" / str(start + 1)).mkdir(parents=True)
if config == "bug" and not first:
    out.mkdir(exist_ok=True)
    (out / "FATAL").write_text("process 1: ValueError")
    sys.exit(1)
if config == "mistake":
    sys.exit(2)
if config == "killed" and start == 0 and not first:
    os.kill(os.getpid(), signal.SIGKILL)
if config in ("stuck", "bug") or config == "killed" and start == 0:
    time.sleep(1)
    sys.exit(134)
if config == "long" or config == "limited" and start == 0:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
    time.sleep(600)
"""

CONFIG = """
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits as long as a credential is good: 2 minutes by default
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=10
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000
NodeName=zz2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster(NamedTuple):
    """How to talk to it: the environment of its commands; where the stand-in for `lckv_jax` is."""

    environment: dict[str, str]
    stand_in: Path


def wait_for(condition: Callable[[], object], told: Callable[[], str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, told()
        time.sleep(0.2)


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def stop_daemons(folder: Path) -> None:
    """Ends the daemons of this cluster, which their pid files name, and waits for them."""
    files = [*folder.glob("slurmd-*.pid"), *folder.glob("slurmctld.pid"), *folder.glob("munged.pid")]
    for pid in [int(file.read_text()) for file in files]:
        try:
            os.kill(pid, signal.SIGTERM)
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    for program in PROGRAMS:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        yield start_cluster(folder)
    finally:
        stop_daemons(folder)
        shutil.rmtree(folder, ignore_errors=True)


def start_cluster(folder: Path) -> Cluster:
    folder.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ports=free_ports(3)))
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    (folder / "state").mkdir()
    package = folder / "stand-in" / "lckv_jax"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(TRAIN)
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
    }
    munged = ["munged", "--force", f"--socket={folder}/munge.sock", f"--key-file={folder}/key"]
    files = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    daemons = [[*munged, *files], ["slurmctld"], ["slurmd", "-N", host], ["slurmd", "-N", "zz2"]]
    for daemon in daemons:
        done = subprocess.run(daemon, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (daemon, done.stdout, done.stderr)
    cluster = Cluster(environment, folder / "stand-in")
    logs = lambda: "\n".join(path.read_text() for path in folder.glob("*.log"))  # noqa: E731
    wait_for(lambda: ask(cluster, "sinfo", "-h", "-o", "%t %D") == "idle 2", logs, 60)
    return cluster


def ask(cluster: Cluster, *command: str) -> str:
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False).stdout.strip()


def submit(cluster: Cluster, source: Path, log: Path, *words: str, options: tuple[str, ...] = ()) -> str:
    """Submits the script with `lckv_jax` from `source`; the job's number."""
    environment = cluster.environment | {"PYTHONPATH": str(source)}
    command = ["sbatch", "--parsable", f"--chdir={source}", f"--output={log}", *options,
               str(ROOT / "launch" / "slurm.sbatch"), *words]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def finished(cluster: Cluster, job: str, log: Path, seconds: float = 120) -> tuple[str, str]:
    """Waits until a job is over; what Slurm says of it, and what it printed."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    told = lambda: log.read_text() if log.exists() else ask(cluster, "scontrol", "show", "job", job)  # noqa: E731
    wait_for(lambda: state(cluster, job)[0] in over, told, seconds)
    return state(cluster, job)[0], log.read_text()


def state(cluster: Cluster, job: str) -> tuple[str, int]:
    """The state of a job, and how often it was requeued."""
    shown = ask(cluster, "scontrol", "show", "job", job)
    return re.findall(r"JobState=(\w+)", shown)[0], int(re.findall(r"Restarts=(\d+)", shown)[0])


@pytest.mark.parametrize(
    ("config", "ends", "restarts", "says"),
    [
        ("fine", "COMPLETED", 0, "fine start 0"),
        ("killed", "COMPLETED", 1, "requeued after exit code 137, to go on from step 1"),
        ("bug", "FAILED", 0, "not retried: process 1: ValueError"),
        ("mistake", "FAILED", 0, "not retried: exit code 2"),
        ("stuck", "FAILED", 2, "given up at step 0: 3 starts in a row saved nothing newer"),
    ],
)
def test_ends(cluster: Cluster, tmp_path: Path, config: str, ends: str, restarts: int, says: str) -> None:
    limited = cluster._replace(environment=cluster.environment | {"RESTARTS_WITHOUT_PROGRESS": "2"})
    job = submit(limited, cluster.stand_in, log := tmp_path / "log", config, f"out={tmp_path / 'runs' / 'run'}")
    how, printed = finished(cluster, job, log)
    assert how == ends, printed
    assert state(cluster, job)[1] == restarts
    assert says in printed
    assert [path.name for path in (tmp_path / "runs").iterdir() if "idle" in path.name] == []


def test_a_cancelled_job_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, cluster.stand_in, log := tmp_path / "log", "long", f"out={tmp_path / 'run'}")
    wait_for(lambda: log.exists() and log.read_text().count("long start") == 2, lambda: ask(cluster, "squeue"))
    ask(cluster, "scancel", job)
    how, printed = finished(cluster, job, log)
    assert (how, state(cluster, job)[1]) == ("CANCELLED", 0), printed


def test_out_must_be_given(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, cluster.stand_in, log := tmp_path / "log", "fine")
    how, printed = finished(cluster, job, log)
    assert how == "FAILED" and "write out=OUT" in printed


def test_before_the_time_limit_it_saves_and_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm's shortest limit is a minute; SIGTERM comes 55 seconds before it."""
    job = submit(cluster, cluster.stand_in, log := tmp_path / "log", "limited", f"out={tmp_path / 'run'}",
                 options=("--time=1", "--signal=TERM@55"))  # fmt: skip
    how, printed = finished(cluster, job, log)
    assert (how, state(cluster, job)[1]) == ("COMPLETED", 1), printed
    assert "requeued after exit code 42, to go on from step 1" in printed


def test_the_tasks_find_each_other(cluster: Cluster, tmp_path: Path) -> None:
    python = [sys.executable, "-u", "-m", "lckv_jax", "processes"]
    environment = cluster.environment | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["srun", "--nodes=2", "--ntasks-per-node=2", f"--chdir={ROOT}", *python], env=environment,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "detected: Slurm; 4 process(es)" in done.stdout
    assert "collective: the sum of 1 to 4 over all devices is 10" in done.stdout


def test_a_training_that_loses_a_task_goes_on_from_its_last_step(cluster: Cluster, tmp_path: Path) -> None:
    """The real `train`, two tasks on two nodes."""
    config, run = write_tiny_config(tmp_path), tmp_path / "run"
    words = [str(config), f"out={run}", "train.steps=20", "train.save_every=2", "train.log_every=1", "mesh.fsdp=2",
             "processes.heartbeat_seconds=10"]  # fmt: skip
    job = submit(cluster, ROOT, log := tmp_path / "log", *words)
    told = lambda: log.read_text() if log.exists() else ask(cluster, "squeue")  # noqa: E731
    wait_for(lambda: len(saved(run)) >= 2, told, 180)
    victim = task_of(1, run)
    os.kill(victim, signal.SIGKILL)
    how, printed = finished(cluster, job, log, 240)
    assert (how, state(cluster, job)[1]) == ("COMPLETED", 1), printed
    assert re.search(r"requeued after exit code (137|134), to go on from step \d+", printed), printed
    resumed = int(re.findall(r"resuming .* from step (\d+)", printed)[0])
    assert resumed in range(4, 20, 2) and max(saved(run)) == 20
    records = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 21))


def saved(run: Path) -> list[int]:
    return [int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit()]


def task_of(number: int, run: Path) -> int:
    """The process of Slurm's task of that number whose run has this folder."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"lckv_jax" in words and f"out={run}".encode() in words and f"SLURM_PROCID={number}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no process {number} of {run}")
