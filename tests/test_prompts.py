"""The command `generate`: what it prints and writes, and its mistakes."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lckv_jax import checkpoint
from lckv_jax.__main__ import main
from lckv_jax.decode import generate as module
from lckv_jax.decode import prompts as command
from lckv_jax.decode.generate import generate
from lckv_jax.decode.prompts import _read_prompts


@pytest.fixture(scope="module")
def run(trained):
    return trained / "run"


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(module, "_BUCKET", 64)


def expected(run, prompt, new, **options):
    params, config, tokenizer = checkpoint.load(run)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    (tokens,) = generate(params, config.model, [ids], new, stop=[tokenizer.eos_id], **options)
    return tokenizer.decode([*ids, *tokens]), tokens


@pytest.mark.parametrize("prompt", ["import os", "class A:", "x = [1,", "7", ""])
def test_a_prompt(run, capsys, prompt):
    assert main(["generate", str(run), f"prompt={prompt}", "max_new_tokens=21"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected(run, prompt, 21)[0].rstrip("\n")


def test_what_is_typed(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\nclass A\n"))
    assert main(["generate", str(run), "max_new_tokens=3", "cache=sinks(2,16)+int8"]) == 0
    want = [expected(run, prompt, 3, cache="sinks(2,16)+int8")[0] for prompt in ("import os", "class A")]
    assert capsys.readouterr().out.split() == " ".join(want).split()


def test_a_file_of_prompts(run, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n\n{"prompt": "def"}\n{"prompt": "for x in"}\n')
    command = ["generate", str(run), f"file={tmp_path / 'in.jsonl'}", "max_new_tokens=5", "batch_size=2"]
    assert main([*command, f"out={tmp_path / 'new' / 'out.jsonl'}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["import os", "def", "for x in"]
    for row in rows:
        assert row["tokens"] == expected(run, row["prompt"], 5)[1]
        assert len(row["logprobs"]) == len(row["tokens"]) and max(row["logprobs"]) < 0
    capsys.readouterr()
    (tmp_path / "in.txt").write_text("import os\ndef\nfor x in\n")
    assert main(["generate", str(run), f"file={tmp_path / 'in.txt'}", *command[3:]]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def test_rows_draw_the_same_whatever_the_batch(run, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("import os\ndef\nfor x in\n")
    texts = []
    for size in (1, 3):
        drawn = ["sampling.temperature=1.5", "sampling.seed=4", f"batch_size={size}", "max_new_tokens=6"]
        assert main(["generate", str(run), f"file={tmp_path / 'in.txt'}", *drawn]) == 0
        texts.append([json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines()])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl"])
def test_only_line_feeds_end_lines(tmp_path, name):
    """Form feeds stand in Python files, and JSON may have U+2028 as it is."""
    prompts = ["import os\x0c", "a\u2028b\x85"]
    lines = prompts if name == "in.txt" else [json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts]
    (tmp_path / name).write_bytes("\r\n".join(lines).encode())
    assert _read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["prompt=a", "file=b"], "leave one out"),
        (["prompt=a", "out=b"], "out is for the prompts of a file"),
        (["prompt=a", "cache=fool"], "did you mean full"),
        (["prompt=a", "passes=exakt"], "did you mean 'exact'"),
        (["prompt=a", "passes=9"], "no tolerance"),
        (["prompt=a", "max_new_tokens=0"], "max_new_tokens"),
        (["prompt=a", "max_new_tokens=null"], "grows without end"),
        (["prompt=a", "temperature=1"], "temperature"),
        (["prompt=a", "sampling.temperature=-1"], "sampling.temperature"),
        (["prompt=a", "cache=kivi(2,7,14)"], "groups of 7 channels"),
        (["file=absent.jsonl"], "absent.jsonl: cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(run, capsys, monkeypatch, tmp_path, settings, words):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(run), *settings]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and words in captured.err
    assert not captured.out  # the prompt is not shown first


@pytest.mark.parametrize("way", ["prompt", "file"])
def test_a_prompt_longer_than_rows_of_the_training_is_told(run, tmp_path, capsys, way):
    (tmp_path / "in.txt").write_text("import os\n" + "a = 1; " * 60)
    settings = [f"file={tmp_path / 'in.txt'}"] if way == "file" else ["prompt=" + "a = 1; " * 60]
    assert main(["generate", str(run), *settings, "max_new_tokens=2", "passes=trained"]) == 0
    assert re.search(r"note: a prompt of \d+ tokens, but rows of the training had \d+;", capsys.readouterr().err)
    assert main(["generate", str(run), "prompt=a", "max_new_tokens=2"]) == 0
    assert "note:" not in capsys.readouterr().err


def test_ctrl_c_while_it_compiles_ends_with_130(run):
    """The interpreter's own end would crash beside threads of XLA."""
    words = ["generate", str(run), "prompt=import os", "cache=sinks(4,60)", "max_new_tokens=null"]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        [sys.executable, "-m", "lckv_jax", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root
    ) as process:
        assert process.stdout is not None
        process.stdout.read(len("import os"))  # the prompt is shown, and the first program is being compiled
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and told.endswith(b"run the same command again\n")


def test_ctrl_c_while_it_streams_ends_the_line(run, capsys, monkeypatch):
    def interrupted(*_, **__):
        yield [5]
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "stream", interrupted)
    assert main(["generate", str(run), "prompt=import os"]) == 130
    captured = capsys.readouterr()
    assert captured.out.startswith("import os") and captured.out.endswith("\n") and captured.err.startswith("stopped;")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1: is not JSON"),
        ('\n{"prompt": "a"}\n\n{', "line 4: is not JSON"),
        ('{"text": "a"}', "it has text"),
        ("[1]", "it is [1]"),
        ("\n", "holds no prompt"),
    ],
)
def test_files_that_hold_no_prompts(run, capsys, tmp_path, text, words):
    (tmp_path / "in.jsonl").write_text(text)
    assert main(["generate", str(run), f"file={tmp_path / 'in.jsonl'}"]) == 2
    assert words in capsys.readouterr().err
