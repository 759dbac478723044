"""The other files of launch/: what can be known without a cloud, and tpu-pod.sh against a stand-in for gcloud."""

import copy
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lckv_jax import errors

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
COMMAND = ["python", "-u", "-m", "lckv_jax", "train"]
JOBSETS = list(yaml.safe_load_all((LAUNCH / "gke-jobset.yaml").read_text()))


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu-pod.sh", "xla_flags.env"])
def test_shell(name: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", "--shell=bash", LAUNCH / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_all_start_the_same_training() -> None:
    for name in ("slurm.sbatch", "tpu-pod.sh", "skypilot.yaml"):
        assert re.search(r"-u -m lckv_jax", (LAUNCH / name).read_text()), name


# --- gke-jobset.yaml --------------------------------------------------------------------------------------------------


def check_jobset(jobset: dict[str, Any]) -> None:
    """Its jobs against Kubernetes' own schema; what JobSet adds, and what a training needs of both."""
    import kubernetes_validate

    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) <= {"network", "coordinator", "failurePolicy", "replicatedJobs"}
    policy = jobset["spec"]["failurePolicy"]
    assert set(policy) == {"maxRestarts", "restartStrategy", "rules"} and policy["maxRestarts"] > 0
    assert policy["restartStrategy"] in ("Recreate", "BlockingRecreate", "InPlaceRestart")
    for rule in policy["rules"]:
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:-]*[A-Za-z0-9_])?", rule["name"])
    assert [rule["action"] for rule in policy["rules"] if "PodFailurePolicy" in rule["onJobFailureReasons"]] == [
        "FailJobSet"
    ]
    for replicated in jobset["spec"]["replicatedJobs"]:
        assert set(replicated) == {"name", "replicas", "template"} and set(replicated["template"]) == {"spec"}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
        check_job(job["spec"])


def check_job(spec: dict[str, Any]) -> None:
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0  # JobSet starts all pods again, a Job only the one that died
    (rule,) = spec["podFailurePolicy"]["rules"]
    (container,) = spec["template"]["spec"]["containers"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [1, 2]}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > 60
    assert container["command"][:5] == COMMAND


def needs_schemas() -> None:
    """With LCKV_REQUIRE_KUBERNETES=1 in the environment, as in .ci/run, they must be there."""
    if importlib.util.find_spec("kubernetes_validate") is None:
        assert os.environ.get("LCKV_REQUIRE_KUBERNETES") != "1"
        pytest.skip("kubernetes-validate absent: pip install -e '.[dev]'")


@pytest.mark.parametrize("jobset", JOBSETS, ids=lambda jobset: jobset["metadata"]["name"])
def test_jobset(jobset: dict[str, Any]) -> None:
    needs_schemas()
    check_jobset(jobset)


def test_a_document_for_each_accelerator() -> None:
    resources = [next(iter(containers(jobset)[0]["resources"]["limits"])) for jobset in JOBSETS]
    assert resources == ["google.com/tpu", "nvidia.com/gpu"]
    assert [jobset["metadata"]["labels"] for jobset in JOBSETS] == [{"accelerator": "tpu"}, {"accelerator": "gpu"}]


def containers(jobset: dict[str, Any]) -> list[dict[str, Any]]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]


def rename(tree: dict[str, Any], before: str, after: str) -> None:
    tree[after] = tree.pop(before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda jobset: rename(containers(jobset)[0], "command", "comand"),
        lambda jobset: jobset["spec"]["replicatedJobs"][0]["template"]["spec"].update(completionMode="indexed"),
        lambda jobset: jobset["spec"]["replicatedJobs"][0]["template"]["spec"].update(parallelism="2"),
        lambda jobset: jobset["spec"]["replicatedJobs"][0]["template"]["spec"].pop("podFailurePolicy"),
        lambda jobset: jobset["spec"]["failurePolicy"].pop("rules"),
        lambda jobset: rename(jobset["spec"], "failurePolicy", "failurepolicy"),
    ],
    ids=["key", "choice", "type", "pod policy", "rules", "policy"],
)
def test_a_broken_jobset_is_refused(damage: Any) -> None:
    needs_schemas()
    import kubernetes_validate

    for jobset in JOBSETS:
        damage(broken := copy.deepcopy(jobset))
        with pytest.raises((AssertionError, KeyError, kubernetes_validate.ValidationError)):
            check_jobset(broken)


def test_each_gpu_pod_is_told_who_it_is() -> None:
    """What Kubernetes makes of the environment: fieldRef, then $(NAME) of what stands before."""
    jobset = JOBSETS[1]
    coordinator = jobset["spec"]["coordinator"]
    assert coordinator == {"replicatedJob": jobset["spec"]["replicatedJobs"][0]["name"], "jobIndex": 0, "podIndex": 0}
    fields = {
        "metadata.labels['jobset.sigs.k8s.io/coordinator']": "lckv-gpu-node-0-0.lckv-gpu",
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": "1",
    }
    environment: dict[str, str] = {}
    for entry in containers(jobset)[0]["env"]:
        value = entry["value"] if "value" in entry else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        environment[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], value)
    nodes = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"]
    assert environment.pop("COORDINATOR")
    assert environment == {
        "JAX_COORDINATOR_ADDRESS": "lckv-gpu-node-0-0.lckv-gpu:8476",
        "JAX_NUM_PROCESSES": str(nodes),
        "JAX_PROCESS_ID": "1",
    }


# --- skypilot.yaml ----------------------------------------------------------------------------------------------------


def test_skypilot(tmp_path: Path) -> None:
    if importlib.util.find_spec("sky") is None:
        pytest.skip("skypilot absent: pip install skypilot")
    script = "import sys, sky; print(sky.Task.from_yaml(sys.argv[1]).num_nodes)"
    broken = tmp_path / "broken.yaml"
    broken.write_text((LAUNCH / "skypilot.yaml").read_text().replace("num_nodes", "num_node"))
    good, bad = (
        subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, check=False)
        for path in (LAUNCH / "skypilot.yaml", broken)
    )
    assert good.stdout.split()[-1:] == ["2"], good.stderr
    assert bad.returncode != 0 and "num_node" in bad.stderr


def test_skypilot_tells_each_node_who_it_is(tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert not {1, 2} & set(task["resources"]["job_recovery"]["recover_on_exit_codes"])
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID $*"')
    python.chmod(0o755)
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=os.environ | task["envs"] | given, capture_output=True, text=True
    )
    assert done.stdout == "10.0.0.1:8476 2 1 -u -m lckv_jax train configs/lckv-50m.yaml out=/runs/lckv-50m\n"


# --- xla_flags.env ----------------------------------------------------------------------------------------------------


def flags(name: str) -> str:
    """A variable as the file sets it for a shell that had none."""
    shell = f"unset {name}; . {LAUNCH / 'xla_flags.env'}; echo ${name}"
    return subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.strip()


def test_xla_knows_the_flags() -> None:
    """XLA ends a process that gives it a flag that it does not know, on every kind of device."""
    given = flags("XLA_FLAGS")
    assert given.count("--xla_gpu_") == len(given.split()) >= 5
    script = "import jax; print(jax.device_count())"
    for extra, ends_well in ((" --xla_gpu_unheard_of=true", False), ("", True)):
        environment = os.environ | {"XLA_FLAGS": given + extra, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == ends_well, done.stderr


def test_flags_are_added_to_those_that_are_set() -> None:
    shell = f"export LIBTPU_INIT_ARGS=--mine=1; . {LAUNCH / 'xla_flags.env'}; bash -c 'echo $LIBTPU_INIT_ARGS'"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    first, *rest = done.stdout.split()
    assert first == "--mine=1" and rest and all(word.startswith("--xla_tpu_") for word in rest)


# --- tpu-pod.sh -------------------------------------------------------------------------------------------------------

# A slice of two workers, each a folder; its state is a file. The training of a worker that leaves a file `taken` there
# was taken away with its machine: nothing is heard of it.
GCLOUD = r"""#!/bin/bash
echo "$3 $4" >> "$CLOUD/calls"
case "$3 $4" in
"queued-resources describe") cat "$CLOUD/state" 2>/dev/null || exit 1 ;;
"queued-resources create") echo ACTIVE > "$CLOUD/state"; mkdir "$CLOUD/0" "$CLOUD/1" ;;
"queued-resources delete") rm -r "$CLOUD/state" "$CLOUD/0" "$CLOUD/1" ;;
"tpu-vm scp") for worker in 0 1; do cp "$5" "$CLOUD/$worker/"; done ;;
"tpu-vm ssh")
    [ "$(cat "$CLOUD/state")" = ACTIVE ] || exit 255
    while [ "$1" != --command ]; do shift; done
    for worker in 0 1; do
        (cd "$CLOUD/$worker" && WORKER=$worker env --default-signal=INT bash -c "$2") & jobs+=($!)
    done
    code=0
    for job in "${jobs[@]}"; do wait "$job" || code=$?; done
    [ ! -e "$CLOUD/taken" ] || { rm "$CLOUD/taken"; echo SUSPENDED > "$CLOUD/state"; exit 255; }
    exit $code ;;
esac
"""

# Stands in for `python -m lckv_jax train CONFIG out=OUT`: goes on from the newest step; CONFIG says what befalls it.
TRAIN = """
import os, signal, sys, time
from pathlib import Path
worker, (config, out), cloud = os.environ["WORKER"], sys.argv[2:4], Path(os.environ["CLOUD"])
steps = Path(out.removeprefix("out=")) / "checkpoints"
newest = max([int(path.name) for path in steps.glob("*")], default=0)
print(f"worker {worker} from step {newest}", flush=True)
time.sleep(0.3)
if config == "bug":
    sys.exit(1 if worker == "1" else 134)
if config == "stuck":
    sys.exit(134)
if config == "long":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
    (cloud / f"running-{worker}").touch()
    time.sleep(60)
if worker == "0":
    (steps / str(newest + 5)).mkdir(parents=True)
if newest == 0 and worker == "1":
    (cloud / "taken").touch()
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
if newest == 5:
    sys.exit(134)
"""


def tpu_pod(tmp_path: Path, mode: str, config: str) -> subprocess.Popen[str]:
    """Starts the script with the stand-ins; its slice lives in tmp_path/cloud."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    (tmp_path / "cloud").mkdir(exist_ok=True)
    (tmp_path / "train.py").write_text(TRAIN)
    setup = f"rm lckv_jax/*.py && cp {tmp_path}/train.py lckv_jax/__main__.py && mkdir -p .venv/bin && "
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CLOUD": str(tmp_path / "cloud"),
        "SETUP": f"{setup} ln -sf {sys.executable} .venv/bin/python",
        "POLL": "0.1",
        "RESTARTS_WITHOUT_PROGRESS": "2",
        "TPU": "slice",
        "ZONE": "zone",
        "TYPE": "v6e-8",
        "VERSION": "v2",
    }
    command = [LAUNCH / "tpu-pod.sh", mode, "train", config, f"out={tmp_path / 'run'}"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def calls(tmp_path: Path) -> list[str]:
    """What was asked of the slice itself, in turn."""
    asked = (tmp_path / "cloud" / "calls").read_text().split()[1::2]
    return [call for call in asked if call != "describe"]


def test_a_preempted_slice_is_replaced_and_the_training_goes_on(tmp_path: Path) -> None:
    process = tpu_pod(tmp_path, "keep", "taken")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert re.findall(r"worker 0 from step (\d+)", printed) == ["0", "5", "10"], printed
    assert "slice slice: SUSPENDED" in printed and "starting again after exit code 134" in printed
    asked = [call for call in calls(tmp_path) if call in ("create", "delete", "scp")]
    assert asked == ["create", "scp", "delete", "create", "scp", "delete"]  # 134 needed no other slice
    assert not (tmp_path / "cloud" / "state").exists()


def test_a_bug_is_not_retried(tmp_path: Path) -> None:
    process = tpu_pod(tmp_path, "keep", "bug")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "slice slice is still there, and costs" in printed, printed
    assert calls(tmp_path).count("create") == 1 and printed.count("worker 0 from") == 1


def test_starts_without_progress_are_bounded(tmp_path: Path) -> None:
    process = tpu_pod(tmp_path, "keep", "stuck")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 134 and printed.count("worker 0 from step 0") == 3, printed
    assert "given up at step 0: 3 starts in a row began there" in printed


def test_once_trains_on_the_slice_that_is_there(tmp_path: Path) -> None:
    for worker in ("0", "1"):
        (tmp_path / "cloud" / worker).mkdir(parents=True)
    (tmp_path / "cloud" / "state").write_text("ACTIVE")
    (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
    process = tpu_pod(tmp_path, "once", "fine")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "worker 1 from step 10" in printed, printed
    assert set(calls(tmp_path)) == {"scp", "ssh"}


def test_ctrl_c_lets_the_workers_save(tmp_path: Path) -> None:
    process = tpu_pod(tmp_path, "keep", "long")
    end = time.monotonic() + 60
    while not all((tmp_path / "cloud" / f"running-{worker}").exists() for worker in "01"):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 42 and "the workers save first" in printed, printed
    assert "delete" not in calls(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "write keep or once"),
        (["keep", "train", "c.yaml", "out=x"], "export TPU=NAME and ZONE=ZONE"),
    ],
)
def test_tpu_pod_mistakes(words: list[str], says: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("TPU", "ZONE")}
    done = subprocess.run([LAUNCH / "tpu-pod.sh", *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and says in done.stderr


# --- docs/launch.md ---------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")


def test_the_page_names_files_that_exist() -> None:
    named = set(re.findall(r"(?:launch|configs)/[\w-]+\.\w+", PAGE))
    assert all((ROOT / name).exists() for name in named), named
    assert {path.name for path in LAUNCH.iterdir() if path.is_file()} <= {Path(name).name for name in named}


def test_the_page_knows_every_exit_code() -> None:
    rows = dict(re.findall(r"^\| (\d+) \|.*\| (\w*) ?\|$", PAGE, re.M))
    codes = {getattr(errors, name) for name in ("BUG", "MISTAKE", "STOPPED", "INTERRUPTED", "PEER_FAILED", "HUNG")}
    assert set(map(int, rows)) == codes | {0}
    recovered = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["resources"]["job_recovery"]
    again = {int(code) for code, word in rows.items() if word == "yes"}
    assert again == set(recovered["recover_on_exit_codes"])


def test_the_first_command_of_the_page(tmp_path: Path) -> None:
    """The page's own command, with this Python; it prints what the page shows."""
    line = next(line for line in PAGE.splitlines() if line.startswith("python launch/local.py"))
    words = [sys.executable if word == "python" else word for word in line.split()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shown = [re.sub(r"[\d.]+ (?=m?s$)|host-a|\(pid \d+\)", "", text) for text in re.findall(r"^    (.*)", PAGE, re.M)]
    printed = [text.removeprefix("[0] ") for text in done.stdout.splitlines()]
    told = [re.sub(r"[\d.]+ (?=m?s$)|(?<=: )[\w.-]+(?= \(pid)|\(pid \d+\)", "", text) for text in printed]
    assert [text for text in shown if text not in told] == []
