"""`evaluate --suite`: from the checkpoint to the tables, resumed after whatever stops it, refused where it must be."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lckv_jax.__main__ import main
from lckv_jax.checkpoint import load
from lckv_jax.errors import UserError
from lckv_jax.evaluate.perplexity import score
from lckv_jax.evaluate.rows import read_text, text_pieces
from lckv_jax.evaluate.suite import evaluate_suite
from lckv_jax.evaluate.suite_config import load_suite

ROOT = Path(__file__).resolve().parent.parent
SUITE = """
perplexity:
  first: {max_tokens: 200, stride: 8, by_position: 8, by_document: true}
  second: {max_tokens: 100}
decode:
  caches: {cache: full, max_tokens: 100}
"""


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(SUITE)
    return str(path)


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    (folder / "some.yaml").write_text(SUITE)
    evaluate_suite(str(trained / "run"), str(folder / "some.yaml"), [f"out={folder / 'out'}"])
    return folder / "out"


def results(folder):
    return json.loads((folder / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def entries(folder):
    return {path.name.rpartition("-")[0]: path for path in (folder / "entries").glob("*.json")}


# ---------------------------------------------------------------- numbers


def test_the_numbers_are_those_of_score(trained, suite, tmp_path, capsys):
    run_folder, out = trained / "run", tmp_path / "out"
    evaluate_suite(str(run_folder), suite, [f"out={out}", "passes=exact"])
    found = {record["name"]: record for record in results(out)["entries"]}
    params, run, tokenizer = load(run_folder)
    text = read_text(run, (), 100, tokenizer)
    documents = text_pieces(text, len(text.tokens), "masked")
    windows = [document[start : start + 33] for document in documents for start in range(0, len(document) - 1, 32)]
    rows = text_pieces(text, 32, "masked")
    scores = [-x for x in score(params, run.model, [*windows, *rows])]
    nats, row_nats = np.concatenate(scores[: len(windows)]), np.concatenate(scores[len(windows) :])
    second = found["second"]["results"]
    assert second["tokens"] == len(nats)
    np.testing.assert_allclose(second["nats"]["value"], nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(second["bits_per_byte"]["value"], nats.sum() / np.log(2) / text.bytes, rtol=1e-5)
    first = found["first"]["results"]
    assert sum(document["tokens"] for document in first["by_document"]) == first["tokens"]
    assert sum(bucket["tokens"] for bucket in first["by_position"]) == first["tokens"]
    (full,) = found["caches"]["results"]["caches"]
    np.testing.assert_allclose(full["nats"], row_nats.mean(), rtol=1e-5)
    assert full["stderr"] > 0
    out_text = capsys.readouterr().out
    assert "3 entries" in out_text and "[3/3] decode caches: perplexity full" in out_text


MESHES = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
from lckv_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_eight_devices_give_the_same(trained, suite, tmp_path, measured):
    words = ["evaluate", str(trained / "run"), "--suite", suite, f"out={tmp_path}", "mesh.fsdp=2", "mesh.tensor=2"]
    _, err = (process := run_script(MESHES, words)).communicate(timeout=200)
    assert process.returncode == 0, err
    one, eight = results(measured), results(tmp_path)
    assert (one["mesh"]["data"], eight["mesh"]) == (1, {"data": 2, "fsdp": 2, "tensor": 2})
    for mine, theirs in zip(one["entries"], eight["entries"]):
        check_numbers(mine["results"], theirs["results"])


def check_numbers(mine, theirs):
    """Equal but for rounding, and for how fast it went."""
    assert type(mine) is type(theirs)
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"tokens_per_second", "residual"}:
            check_numbers(mine[name], theirs[name])
    elif isinstance(mine, list):
        for a, b in zip(mine, theirs, strict=True):
            check_numbers(a, b)
    elif isinstance(mine, float):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4)
    else:
        assert mine == theirs


# ---------------------------------------------------------------- resuming


def run_script(script, words):
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir  # as conftest.py sets it
    environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script, *words], cwd=ROOT, env=environ, **pipes)


SLEEPS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner may have been started without
from lckv_jax import __main__
from lckv_jax.evaluate import suite_entries
def sleep(*arguments, **settings):
    print("asleep", flush=True)
    time.sleep(600)
suite_entries.measure_caches = sleep
__main__._leave(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGTERM", 42), ("SIGINT", 130)])
def test_a_stopped_evaluation_keeps_what_is_finished(trained, suite, tmp_path, capsys, name, code):
    run_folder, out = str(trained / "run"), tmp_path / "out"
    words = ["evaluate", run_folder, "--suite", suite, f"out={out}"]
    process = run_script(SLEEPS, words)
    for line in process.stdout:
        if line == "asleep\n":
            break
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    if name != "SIGKILL":
        assert "nothing" in err and "lost" in err and "Traceback" not in err
    assert results(out)["missing"] == ["decode caches"]
    assert "Not measured yet: decode caches." in (out / "results.md").read_text()
    before = {name: path.stat().st_mtime_ns for name, path in entries(out).items()}
    assert before.keys() == {"perplexity-first", "perplexity-second"}
    assert main(words) == 0
    assert capsys.readouterr().out.count("(kept from before)") == 2
    after = {name: path.stat().st_mtime_ns for name, path in entries(out).items()}
    assert after.keys() == before.keys() | {"decode-caches"} and before.items() <= after.items()
    assert results(out)["missing"] == [] and len(results(out)["entries"]) == 3


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ([], 0),
        (["perplexity.first.stride=4"], 1),
        (["perplexity.second.seq_len=16"], 1),
        (["passes=exact"], 3),
        (["perplexity.second.files=FILE"], 1),
    ],
)
def test_what_an_entry_depends_on_decides_whether_it_is_kept(trained, suite, tmp_path, measured, change, again):
    (tmp_path / "text.txt").write_text("def first(x):\n    return x\n" * 4)
    shutil.copytree(measured, tmp_path / "out")
    change = [word.replace("FILE", str(tmp_path / "text.txt")) for word in change]
    before = set((tmp_path / "out" / "entries").glob("*.json"))
    evaluate_suite(str(trained / "run"), suite, [f"out={tmp_path / 'out'}", *change])
    assert len(set((tmp_path / "out" / "entries").glob("*.json")) - before) == again


def test_another_text_of_one_name_is_measured_again(trained, suite, tmp_path, capsys, measured):
    shutil.copytree(measured, tmp_path / "out")
    for path in (tmp_path / "out" / "entries").glob("perplexity-second-*.json"):
        path.unlink()
    text, words = tmp_path / "text.txt", [f"out={tmp_path / 'out'}", f"perplexity.second.files={tmp_path}/text.txt"]
    for content in ("import os\n" * 9, "import os\n" * 9, "import re\n" * 9):
        text.write_text(content)
        evaluate_suite(str(trained / "run"), suite, words)
    assert len(list((tmp_path / "out" / "entries").glob("perplexity-second-*.json"))) == 2
    assert capsys.readouterr().out.count("(kept from before)") == 2 + 3 + 2


def test_another_checkpoint_is_measured_again(trained, suite, tmp_path, measured):
    shutil.copytree(measured, tmp_path / "out")
    first = min(int(path.name) for path in (trained / "run" / "checkpoints").iterdir())
    evaluate_suite(str(trained / "run" / "checkpoints" / str(first)), suite, [f"out={tmp_path / 'out'}"])
    assert len(list((tmp_path / "out" / "entries").glob("*.json"))) == 6
    assert {record["step"] for record in results(tmp_path / "out")["entries"]} == {first}


def test_a_damaged_entry_is_measured_again(trained, suite, tmp_path, measured):
    shutil.copytree(measured, tmp_path / "out")
    path = entries(tmp_path / "out")["decode-caches"]
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:50])
    evaluate_suite(str(trained / "run"), suite, [f"out={tmp_path / 'out'}"])
    mine, theirs = (record["results"]["caches"][0]["nats"] for record in (whole, json.loads(path.read_text())))
    assert mine == theirs


def test_results_lie_in_the_run_by_default(trained, suite, tmp_path, measured):
    folder = tmp_path / "run" / "evaluations" / "some-6"
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(measured / "entries", folder / "entries")  # so that nothing is left to do
    evaluate_suite(str(tmp_path / "run"), suite)
    assert list((tmp_path / "run" / "evaluations").iterdir()) == [folder]
    assert results(folder)["checkpoint"]["step"] == 6


# ---------------------------------------------------------------- tasks


def write_piqa(folder):
    items = [{"goal": f"say {word}", "sol1": word, "sol2": word[::-1], "label": n % 2} for n, word in enumerate(WORDS)]
    (folder / "piqa.validation.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


WORDS = ["return", "import", "class", "lambda"]


def test_tasks_are_entries_like_others(trained, tmp_path, monkeypatch, capsys):
    """Their numbers are the harness' own, they are kept, and other data are measured again."""
    write_piqa(tmp_path)
    (tmp_path / "tasks.yaml").write_text("tasks: {names: [piqa], data: $TASK_DATA, limit: 3, max_length: 32}\n")
    monkeypatch.setenv("TASK_DATA", str(tmp_path))
    words = (str(trained / "run"), str(tmp_path / "tasks.yaml"), [f"out={tmp_path / 'out'}"])
    evaluate_suite(*words)
    (record,) = results(tmp_path / "out")["entries"]
    params, run, tokenizer = load(trained / "run")
    right = 0
    for number, word in enumerate(WORDS[:3]):
        texts = [f"Question: say {word}\nAnswer:", *(f"Question: say {word}\nAnswer: {x}" for x in (word, word[::-1]))]
        context, *both = ([tokenizer.bos_id, *tokenizer.encode(text)] for text in texts)
        scores = score(params, run.model, both, passes="trained")
        right += int(np.argmax([x[len(context) - 1 :].sum() for x in scores])) == number % 2
    assert record["results"]["metrics"]["acc"][0] == pytest.approx(right / 3)
    assert record["results"]["exact_difference"]["items"] == record["results"]["items"] == 3
    assert list(record["data"]) == ["piqa.validation.jsonl"]
    evaluate_suite(*words)
    assert capsys.readouterr().out.count("(kept from before)") == 1
    file = tmp_path / "piqa.validation.jsonl"
    file.write_text(file.read_text().replace("lambda", "global"))
    evaluate_suite(*words)
    assert "(kept from before)" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqqa", str, "piqa"),
        ("boolq", str, "boolq.validation.jsonl"),
        ("piqa", lambda text: text.replace("sol2", "solution2"), "sol2"),
    ],
)
def test_mistakes_in_tasks_are_one_sentence_before_any_work(
    trained, suite, tmp_path, monkeypatch, name, change, message
):
    write_piqa(tmp_path)
    path = tmp_path / "piqa.validation.jsonl"
    path.write_text(change(path.read_text()))
    monkeypatch.setattr("lckv_jax.evaluate.suite._records", lambda *arguments: pytest.fail("it began to work"))
    with pytest.raises(UserError, match=message) as caught:
        evaluate_suite(
            str(trained / "run"), suite, [f"out={tmp_path / 'out'}", f"tasks.names={name}", f"tasks.data={tmp_path}"]
        )
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["perplexity.first.strid=4"], "perplexity.first.strid: unknown key; did you mean 'stride'"),
        (["perplexty.first.stride=4"], "perplexty: unknown key; did you mean 'perplexity'"),
        (["tasks.name=[piqa]"], "tasks.name: unknown key; did you mean 'names'"),
        (["decode.caches.seq_length=4"], "decode.caches.seq_length: unknown key; did you mean 'seq_len'"),
        (["perplexity.first.stride=33"], "perplexity.first: stride=33 is longer than seq_len=32"),
        (["perplexity.first.seq_len=4"], "stride=8 is longer than seq_len=4, .* at most 4"),
        (["perplexity.a/b.stride=4"], "perplexity.a/b"),
        (["perplexity=validation"], "each entry has a name"),
        (["decode.caches.cache=windows(4)"], "decode.caches.cache: there is no policy 'windows"),
        (["decode.caches.cache=budget(8,2,snapkv)"], "with prompt_tokens"),
        (["passes=exakt"], "did you mean 'exact'"),
        (["passes=[trained,exact]"], "one setting holds for all of a suite"),
        (["passes=3"], "3 is too large"),
        (["mesh.data=3"], "does not fit the"),
        (["perplexity.first.files=nowhere/*.txt"], "matches no file"),
        (["tasks.names=[piqa]", "tasks.data=nowhere"], "tasks.data=nowhere is no folder"),
        (["tasks.names=[piqa]", "tasks.data=$NOT_SET_HERE/x"], "that variable is not set"),
        (["out=FILE/results"], "cannot be written: Not a directory"),
        (["out=gs://bucket"], "is a bucket"),
    ],
)
def test_mistakes_are_one_sentence_before_any_work(trained, suite, tmp_path, monkeypatch, overrides, message):
    (tmp_path / "file").write_text("")
    overrides = [f"out={tmp_path / 'out'}", *(word.replace("FILE", str(tmp_path / "file")) for word in overrides)]
    monkeypatch.setattr("lckv_jax.evaluate.suite._records", lambda *arguments: pytest.fail("it began to work"))
    with pytest.raises(UserError, match=message) as caught:
        evaluate_suite(str(trained / "run"), suite, overrides)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_suites(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read as a config: No such file"):
        load_suite("nowhere.yaml")
    with pytest.raises(UserError, match=r"quickstart\.yaml: is no suite but a config of train"):
        load_suite(ROOT / "configs" / "quickstart.yaml")
    with pytest.raises(UserError, match=r"50m\.yaml: is no suite but a config of bench"):
        load_suite(ROOT / "configs" / "bench" / "50m.yaml")
    (tmp_path / "empty.yaml").write_text("passes: exact\n")
    with pytest.raises(UserError, match="there is nothing to measure"):
        load_suite(tmp_path / "empty.yaml")


def changed_run(trained, tmp_path, change):
    """A copy of the run whose metadata, and their digest, are changed."""
    from lckv_jax.step_folder import digest

    shutil.copytree(trained / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/meta/metadata"):
        meta = json.loads(path.read_text())
        del meta["digest"]
        change(meta)
        path.write_text(json.dumps(meta | {"digest": digest(meta)}))
    return str(tmp_path / "run")


def test_a_window_longer_than_the_positions_of_the_model(trained, suite, tmp_path):
    run = changed_run(trained, tmp_path, lambda meta: meta["config"]["model"].update(max_position_embeddings=32))
    words = [f"out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"perplexity\.second\.seq_len=33 is longer than the model's 32 positions"):
        evaluate_suite(run, suite, [*words, "perplexity.second.seq_len=33"])
    with pytest.raises(UserError, match=r"tasks\.max_length=64 is longer than the model's 32 positions"):
        evaluate_suite(run, suite, [*words, "tasks.names=[piqa]", "tasks.max_length=64"])


def test_a_tokenizer_that_is_not_the_checkpoints(trained, suite, tmp_path):
    run = changed_run(trained, tmp_path, lambda meta: meta.update(tokenizer="another"))
    with pytest.raises(UserError, match="not the tokenizer that the run was trained with"):
        evaluate_suite(run, suite, [f"out={tmp_path / 'out'}"])


def test_a_run_without_a_tokenizer(trained, suite, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / "tokenizer.model").unlink()
    for words in (["tasks.names=[piqa]"], ["perplexity.first.files=README.md"]):
        with pytest.raises(UserError, match="no tokenizer"):
            evaluate_suite(str(tmp_path / "run"), suite, [f"out={tmp_path / 'out'}", *words])


def test_a_full_disk_is_told(trained, suite, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lckv_jax.evaluate.suite.write_json", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        evaluate_suite(str(trained / "run"), suite, [f"out={tmp_path / 'out'}", "perplexity.first.max_tokens=20"])
