"""`share`: a run folder with fewer caches that every command opens, and what that costs; or one clear sentence."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from stories260k import write_tokenizer
from test_hub import SMALL, small_tensors, write_folder

from lckv_jax import checkpoint
from lckv_jax.__main__ import main
from lckv_jax.convert.hub import load_hub
from lckv_jax.convert.import_hub import import_hub
from lckv_jax.convert.reshare import reshare
from lckv_jax.data.tokenizer import train_sentencepiece
from lckv_jax.model.transformer import forward
from lckv_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
OWN = ["sentences=4", "tokens=16", "max_tokens=200", "seq_len=48", "speed_repeats=0"]
QUICK = ["--data", README, *OWN]


def run(capsys, *arguments):
    code = main(["share", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A random llama of 3 layers with a tokenizer, imported."""
    folder = tmp_path_factory.mktemp("plain")
    config = SMALL | {"vocab_size": 360, "layer_types": "0_1_2"}
    tensors = small_tensors(config)
    del config["layer_types"]
    write_folder(folder / "hub", config | {"model_type": "llama", "max_position_embeddings": 64}, tensors)
    (folder / "hub" / "tokenizer.model").write_bytes(train_sentencepiece([README.read_text(encoding="utf-8")], 360))
    import_hub(str(folder / "hub"), str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def shared(plain, tmp_path_factory):
    """What `share --layers 1` makes of it: (its folder, the report)."""
    out = tmp_path_factory.mktemp("shared") / "out"
    code = main(["share", str(plain), str(out), "--layers", "1", *map(str, QUICK), "threshold=-1", "prompt_tokens=20",
                 "cache=budget(12,4,snapkv)+int8", "speed_repeats=1", "speed_batch=1"])  # fmt: skip
    assert code == 0
    return out, json.loads((out / "report.json").read_text())


def test_what_it_writes(shared):
    out, report = shared
    assert {path.name for path in out.iterdir()} == {
        "checkpoints", "config.json", "tokenizer.model", "report.json", "report.md", "map.png", "distances.png",
    }  # fmt: skip
    assert list(out.parent.iterdir()) == [out]
    assert report["map_before"] == "0_1_2" and report["map"] in ("0_0_2", "0_1_0", "0_1_1")
    assert (report["asked"], report["found"], report["rejected"]) == (1, 1, 0)
    config = json.loads((out / "config.json").read_text())
    assert config["init_from"] == config["out"] == str(out) and config["model"]["sharing"] == report["map"]
    for name in ("map.png", "distances.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    assert report["map"] in text and "reads" in text and "| `budget(12,4,snapkv)+int8` |" in text


def test_the_projections_are_gone_and_all_else_is_as_it_was(shared, plain):
    out, report = shared
    params, config, tokenizer = checkpoint.load(out)
    before, old, same = checkpoint.load(plain)
    assert str(config.model.sharing) == report["map"] and tokenizer.fingerprint == same.fingerprint
    want, _ = reshare(before, old.model, report["map"], "own")
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert params["kv"]["wk"].shape[0] == 2 and before["kv"]["wk"].shape[0] == 3


def test_both_paths_agree_and_costs_are_told(shared):
    _, report = shared
    for when in ("before", "after"):
        found = report["quality"][when]
        assert found["paths_differ_by"] < 1e-5
        assert found["decode"]["tokens"] == found["prefill"][0]["tokens"]
    (found,) = report["caches"]
    before, after = found["before"], found["after"]
    assert found["cache"] == "budget(12,4,snapkv)+int8"
    assert before["held"] * 2 == after["held"] * 3 and before["read"] == after["read"]  # 3 slots before, 2 after
    assert found["speedup"] == before["step_ms"] / after["step_ms"] > 0
    assert 0 < found["tokens"] < report["quality"]["before"]["decode"]["tokens"]  # prompts are not scored
    assert np.isfinite([before["nats"], after["nats"]]).all()


def test_other_commands_open_it(shared, tmp_path, monkeypatch, capsys):
    out, report = shared
    assert main(["evaluate", str(out), "max_tokens=64", f"files={README}"]) == 0
    assert main(["generate", str(out), "prompt=import", "max_new_tokens=2"]) == 0
    assert main(["export", str(out), str(tmp_path / "hf"), "--format", "lckv"]) == 0
    params, config = load_hub(tmp_path / "hf")
    assert str(config.sharing) == report["map"]
    ours, run, _ = checkpoint.load(out)
    tokens = np.arange(24).reshape(2, 12)
    logits = [forward(p, c, tokens) for p, c in ((ours, run.model), (params, config))]
    np.testing.assert_array_equal(*logits)
    capsys.readouterr()


def test_healing(trained, tmp_path, capsys):
    """It trains from the shared model on the run's data; the command that it prints is that training."""
    code, told, _ = run(capsys, trained / "run", tmp_path / "out", "--layers", 1, "--heal", 3,
                        "threshold=-1", *OWN)  # fmt: skip
    assert code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    nats = report["heal"]["nats"]
    assert list(nats) == ["before sharing", "after sharing", "healed"]
    assert report["map"] in ("0_2_2_0", "0_2_2_2") and report["calibration"].endswith(f"split of {trained / 'data'}")
    for when in ("before", "after"):
        assert [entry["passes"] for entry in report["quality"][when]["prefill"]] == ["trained", "exact"]
        assert report["quality"][when]["paths_differ_by"] < 1e-5
    lost = nats["after sharing"] - nats["before sharing"]
    if lost > 0:
        assert report["heal"]["recovered"] == pytest.approx((nats["after sharing"] - nats["healed"]) / lost)
    else:
        assert report["heal"]["recovered"] is None
    command = next(line for line in told.splitlines() if line.startswith("python -m lckv_jax train"))
    for word in (f"{tmp_path}/out/config.json", f"out={tmp_path}/out/healed", "train.steps=3", "seed=1"):
        assert word in command
    _, healed, _ = checkpoint.load(tmp_path / "out" / "healed")
    assert str(healed.model.sharing) == report["map"] and healed.init_from == str(tmp_path / "out")
    assert [
        record["step"] for record in read_metrics(tmp_path / "out" / "healed" / "metrics.jsonl") if "loss" in record
    ]
    assert "## Healing" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_healing_beside_the_unshared_model(trained, tmp_path, capsys):
    code, _, _ = run(capsys, trained / "run", tmp_path / "out", "--layers", 1, "--heal", 3, "heal_control=true", *OWN)
    assert code == 0
    heal = json.loads((tmp_path / "out" / "report.json").read_text())["heal"]
    _, control, _ = checkpoint.load(tmp_path / "out" / "unshared")
    assert str(control.model.sharing) == "0_2_2_3" and control.optimizer.learning_rate == heal["learning_rate"]
    assert "unshared, as many steps" in heal["nats"] and "recovered_of_control" in heal


def test_no_layer_is_the_same_model(plain, tmp_path, capsys):
    code, told, _ = run(capsys, plain / "checkpoints" / "0", tmp_path / "out", "--layers", 0, *QUICK)
    assert code == 0 and "0 of 0 layers gave up" in told
    before, after = checkpoint.load(plain), checkpoint.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, before[0], after[0])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quality"]["before"] == report["quality"]["after"]


def test_fewer_than_asked_are_kept_and_told(plain, tmp_path, capsys):
    code, told, _ = run(capsys, plain, tmp_path / "out", "--layers", 1, "threshold=1", *QUICK)
    assert code == 0
    assert "0 of 1 layers gave up their K,V; 3 of 3 candidates were rejected (cosine at most 1); no candidate" in told
    assert json.loads((tmp_path / "out" / "report.json").read_text())["map"] == "0_1_2"


# ---------------------------------------------------------------- bad input


def refuses(capsys, message, out, *arguments):
    """One sentence, exit code 2, and nothing that was not there before."""
    before = sorted(Path(out).parent.rglob("*"))
    code, _, error = run(capsys, *arguments)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error, error
    assert sorted(Path(out).parent.rglob("*")) == before


def test_bad_input_gets_one_sentence(trained, tmp_path, capsys):
    out, model = tmp_path / "out", trained / "run"

    def check(message, *arguments):
        refuses(capsys, message, out, model, out, *arguments)

    check("only 3 can be given up, so ask for at most 1", "--layers", 2, *OWN)
    check("greater than or equal to 0", "--layers", -1)
    check("invalid int value: 'two'", "--layers", "two")
    check("say how many layers give up their K,V, as in --layers 1", *OWN)
    check("unknown name 'disimilar'; did you mean 'dissimilar'?", "--layers", 1, "--order", "disimilar")
    check("unknown name 'l2'", "--layers", 1, "--metric", "l2")
    check("seed=3 has no effect on order=dissimilar", "--layers", 1, "seed=3")
    check("metric has no effect on --order random", "--layers", 1, "--order", "random", "--metric", "flat_l2")
    check("order has no effect on --sweep", "--sweep", "--order", "random")
    check("heal has no effect on --sweep", "--sweep", "--heal", 2)
    check("heal_control needs heal", "--layers", 1, "heal_control=true")
    check("did you mean 'threshold'?", "--layers", 1, "treshold=0.4")
    check("threshold: input should be less than or equal to 1", "--layers", 1, "threshold=1.5")
    check("there is no policy 'sink(4,60)'; did you mean sinks?", "--layers", 1, "cache=sink(4,60)")
    check("chooses its tokens when a prompt ends", "--layers", 1, "cache=budget(12,4,snapkv)")
    check("prompt_tokens=99 leaves nothing to decode", "--layers", 1, "prompt_tokens=99", *OWN)
    check("unknown name 'exactly'", "--layers", 1, "passes=exactly")
    check("which make", "--layers", 1, "sentences=100000")
    check("nowhere.txt", "--layers", 1, "--data", tmp_path / "nowhere.txt")
    refuses(capsys, "neither a run folder", out, tmp_path / "nowhere", out, "--layers", 1)
    out.mkdir()
    (out / "precious").touch()
    check("is not empty", "--layers", 1)


def test_too_short_a_calibration_is_counted(trained, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("import os\n" * 30)
    code, _, error = run(capsys, trained / "run", tmp_path / "out", "--layers", 1, "--data", tmp_path / "short.txt")
    assert code == 2
    assert "1 documents, which make" in error and "30 of 64 tokens (1,890 in all) are needed" in error
    assert "take fewer: sentences=" in error
    (tmp_path / "tiny.txt").write_text("import os\n" * 10)
    one = ["--layers", 1, "--data", tmp_path / "tiny.txt", "sentences=1", "tokens=1000"]
    refuses(capsys, "tokens to measure on beside the", tmp_path / "out", trained / "run", tmp_path / "out", *one)


def test_another_tokenizer_is_refused(trained, tmp_path, weights, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    write_tokenizer(weights, tmp_path / "run")
    refuses(capsys, "is not the tokenizer that the run was trained with", tmp_path / "out", tmp_path / "run",
            tmp_path / "out", "--layers", 1)  # fmt: skip


def test_an_imported_model_has_no_text_of_its_own(plain, tmp_path, capsys):
    out = tmp_path / "out"
    refuses(capsys, "give some with --data 'texts/*.txt'", out, plain, out, "--layers", 1)
    refuses(capsys, "--heal trains on the run's own text", out, plain, out, "--layers", 1, "--heal", 3, *QUICK)


# ---------------------------------------------------------------- stories260K


@pytest.fixture(scope="module")
def stories(stories_hub, weights, tmp_path_factory):
    """The imported model with its tokenizer."""
    folder = tmp_path_factory.mktemp("stories")
    shutil.copytree(stories_hub, folder / "hub")
    write_tokenizer(weights, folder / "hub")
    import_hub(str(folder / "hub"), str(folder / "run"))
    return folder / "run"


def test_sharing_in_a_trained_model(stories, test_data, tmp_path, capsys):
    """2 of 5 layers: prefill and decode path agree, and each sharing costs something."""
    text = test_data / "tinystories" / "stories.jsonl.gz"
    small = ["max_tokens=1000", "seq_len=128", "speed_repeats=0", "--data", text]
    for layers in (1, 2):
        out = tmp_path / str(layers)
        assert run(capsys, stories, out, "--layers", layers, *small)[0] == 0
        report = json.loads((out / "report.json").read_text())
        assert report["found"] == layers and report["map"].split("_")[0] == "0"
        assert all(trial["cosine"] > 0.5 for trial in report["trials"])
        before, after = report["quality"]["before"], report["quality"]["after"]
        assert before["paths_differ_by"] < 1e-5 and after["paths_differ_by"] < 1e-5
        assert after["decode"]["perplexity"] > 1.1 * before["decode"]["perplexity"]
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["tokenizer"] == str(out / "tokenizer.model")  # the imported model's may go


def test_a_sweep_keeps_its_rows_when_it_is_stopped(stories, test_data, tmp_path):
    """Every row is on disk before the next begins."""
    text = str(test_data / "tinystories" / "stories.jsonl.gz")
    arguments = [sys.executable, "-u", "-m", "lckv_jax", "share", str(stories), str(tmp_path / "out"), "--sweep",
                 "--data", text, "max_tokens=500"]  # fmt: skip
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "1 shared: perplexity" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    told, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
    assert [row["shared"] for row in rows][:2] == [0, 1]
    assert (tmp_path / "out" / "sweep.md").exists() and "rows in" in told


def test_a_whole_sweep(plain, tmp_path, capsys):
    code, told, _ = run(capsys, plain, tmp_path / "out", "--sweep", "threshold=-1", *QUICK)
    assert code == 0 and "| shared layers | dissimilar | similar | random |" in told
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sweep.json", "sweep.md", "sweep.png"}
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(row["order"], row["seed"], row["shared"]) for row in record["rows"]] == [
        (order, seed, number)
        for order, seed in [("dissimilar", None), ("similar", None), ("random", 0), ("random", 1), ("random", 2)]
        for number in (0, 1, 2)
    ]
    by_map = {}
    for row in record["rows"]:
        assert by_map.setdefault(row["map"], row["nats"]) == row["nats"]
