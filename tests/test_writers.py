"""Where records go: metrics.jsonl, TensorBoard's event files, a run of Weights & Biases (its package is a stand-in)."""

import errno
import json
import math
import struct
import sys
from types import SimpleNamespace

import pytest
from small_runs import run_config

from lckv_jax.errors import UserError
from lckv_jax.parallel import processes
from lckv_jax.train import writers
from lckv_jax.train.metrics import read_metrics
from lckv_jax.train.writers import check_writers, open_writers, scalars


def write_steps(config, out, start, stop):
    opened = open_writers(config, out, start)
    for step in range(start + 1, stop + 1):
        opened.write({"step": step, "loss": 1.0 / step, "norms": [1.0, step]})
    opened.write({"step": stop, "valid_loss": 0.5})
    opened.close()


def events(folder):
    """The events of all files of a TensorBoard folder, as TensorBoard reads them: a restart hides what lies beyond."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # a TFRecord: length, checksum of it, data, checksum of that
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]
            if event.session_log.status == SessionLog.START:
                found = [other for other in found if other.step < event.step]
            found.append(event)
    return found


def curve(folder, tag):
    return [(e.step, value.simple_value) for e in events(folder) for value in e.summary.value if value.tag == tag]


def test_metrics_jsonl_alone_by_default(tmp_path):
    write_steps(run_config(tmp_path), tmp_path, 0, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 2, "valid_loss": 0.5}


def test_numbers_that_json_has_no_word_for(tmp_path):
    opened = open_writers(run_config(tmp_path), tmp_path, 0)
    opened.write({"step": 1, "loss": math.nan, "norms": [1.0, math.inf, math.nan], "fine": 2})
    opened.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    want = {"step": 1, "loss": None, "norms": [1.0, None, None], "fine": 2}
    assert record == {**want, "non_finite": ["loss", "norms[1]", "norms[2]"]}


def test_tensorboard_shows_every_record(tmp_path):
    write_steps(run_config(tmp_path, {"tensorboard": True}), tmp_path, 0, 3)
    folder = tmp_path / "tensorboard"
    assert curve(folder, "loss") == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]
    assert curve(folder, "norms/01") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert curve(folder, "valid_loss") == [(3, 0.5)]
    assert not [value.tag for event in events(folder) for value in event.summary.value if value.tag == "step"]


def test_a_resumed_run_has_every_step_once(tmp_path):
    config = run_config(tmp_path, {"tensorboard": True})
    write_steps(config, tmp_path, 0, 6)
    write_steps(config, tmp_path, 4, 8)  # from the checkpoint of step 4: 5 and 6 were lost work
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert steps == [step for step, _ in curve(tmp_path / "tensorboard", "loss")] == list(range(1, 9))
    assert curve(tmp_path / "tensorboard", "valid_loss") == [(8, 0.5)]


def test_tensorboard_takes_what_is_not_finite_or_too_large(tmp_path):
    opened = open_writers(run_config(tmp_path, {"tensorboard": True}), tmp_path, 0)
    opened.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "perplexity": 1e300, "best": None})
    opened.close()
    (nan,) = curve(tmp_path / "tensorboard", "loss")
    assert math.isnan(nan[1])
    assert curve(tmp_path / "tensorboard", "perplexity") == [(1, math.inf)]
    assert curve(tmp_path / "tensorboard", "best") == []


def test_tensorboard_does_without_torch(tmp_path, monkeypatch):
    """An import of torch would take seconds; what stands in for it here fails when it is touched."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboardX"]:
        monkeypatch.delitem(sys.modules, name)
    check_writers(run_config(tmp_path, {"tensorboard": True}).metrics)
    assert "torch" not in sys.modules


@pytest.mark.parametrize(
    ("metrics", "package", "message"),
    [
        ({"tensorboard": True}, "tensorboardX", r"metrics.tensorboard .* pip install 'tensorboardX.*, or set"),
        ({"wandb": "lckv"}, "wandb", r"metrics.wandb .* pip install wandb, or set it to null"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, metrics, package, message):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    config = run_config(tmp_path, metrics)
    with pytest.raises(UserError, match=message):
        check_writers(config.metrics)
    with pytest.raises(UserError, match=message):
        open_writers(config, tmp_path, 0)
    check_writers(run_config(tmp_path).metrics)


def test_a_folder_called_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install wandb"):
        check_writers(run_config(tmp_path, {"wandb": "lckv"}).metrics)


class FakeWandb:
    """The package wandb as far as it is used."""

    class Error(Exception):
        pass

    def __init__(self, refusal=None):
        self.refusal, self.inits, self.logs, self.finished = refusal, [], [], 0

    def Settings(self, **settings):
        return settings

    def init(self, **arguments):
        if self.refusal:
            raise self.Error(self.refusal)
        self.inits.append(arguments)
        return SimpleNamespace(log=lambda data, step: self.logs.append((step, data)), finish=self.finish)

    def finish(self):
        self.finished += 1


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = run_config(tmp_path, {"wandb": "lckv"})
    write_steps(config, tmp_path, 0, 2)
    write_steps(config, tmp_path, 2, 3)
    first, second = wandb.inits
    assert first == second
    assert first["id"] == (tmp_path / "wandb_id").read_text().strip() != ""
    assert (first["project"], first["resume"], first["name"]) == ("lckv", "allow", tmp_path.name)
    assert first["config"]["model"]["hidden_size"] == 16
    assert wandb.logs[0] == (1, {"loss": 1.0, "norms/00": 1.0, "norms/01": 1})
    assert [step for step, data in wandb.logs if "loss" in data] == [1, 2, 3]
    assert wandb.finished == 2
    (tmp_path / "other").mkdir()
    write_steps(config, tmp_path / "other", 0, 1)
    assert wandb.inits[-1]["id"] != first["id"]


def test_what_wandb_says_is_passed_on_and_the_other_files_are_closed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("No API key\n  configured."))
    closed = []
    monkeypatch.setattr(writers.MetricsFile, "close", lambda self: closed.append(self))
    with pytest.raises(UserError, match=r"refuses to start: No API key configured\.; run `wandb login`, "):
        open_writers(run_config(tmp_path, {"wandb": "lckv"}), tmp_path, 0)
    assert len(closed) == 1


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "index", lambda: 1)
    write_steps(run_config(tmp_path, {"tensorboard": True}), tmp_path, 0, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file(tmp_path):
    """The device /dev/full takes nothing; all files are closed all the same."""
    opened = open_writers(run_config(tmp_path, {"tensorboard": True}), tmp_path, 0)
    jsonl, tensorboard = opened._writers
    tensorboard.close()
    tensorboard._file._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115
    jsonl.close()
    jsonl._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(OSError, match=r"metrics\.jsonl") as caught:
        opened.write({"step": 1, "loss": 1.0})
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="tensorboard"):
        for step in range(1000):  # more than its buffer holds
            tensorboard.write({"step": step, "loss": 1.0})
    with pytest.raises(OSError):
        opened.close()
    assert jsonl._file.closed


def test_scalars_are_the_numbers_of_a_record():
    record = {"step": 3, "loss": 1.5, "passes": 9, "norms": [1.0, None], "non_finite": ["norms[1]"], "none": None}
    assert scalars(record) == {"loss": 1.5, "passes": 9, "norms/00": 1.0}
    account = {"step": 3, "time": {"step": 2.0, "lost": 0.5}, "goodput": 0.8, "start": 1, "at": 1e9, "done": True}
    assert scalars(account) == {"time/step": 2.0, "time/lost": 0.5, "goodput": 0.8}


def test_an_account_takes_the_place_of_lost_records(tmp_path):
    write_steps(run_config(tmp_path), tmp_path, 0, 3)
    open_writers(run_config(tmp_path), tmp_path, 1, {"step": 1, "time": {"lost": 2.0}}).close()
    told = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in told] == [1, 1] and told[1]["time"] == {"lost": 2.0}
