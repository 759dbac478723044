"""The README's commands, as written: `make` targets exist, and every `python -m lckv_jax` line runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lckv_jax.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LINES = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
LAUNCHED = [line for line in LINES if line[1:2] == ["launch/local.py"]]
COMMANDS = [line[line.index("lckv_jax") + 1 :] for line in LINES if "lckv_jax" in line and line not in LAUNCHED]
# the same command on the smallest scale, away from the user's folders
SMALL = ["model.vocab_size=512", "model.hidden_size=32", "data.seq_len=32", "data.batch_size=2", "train.steps=2",
         "optimizer.warmup_steps=1", "train.eval_batches=1"]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_runs(command, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(ROOT)
    if command[0] in ("export", "import"):
        monkeypatch.chdir(tmp_path)
        run = request.getfixturevalue("trained") / "run"
        if command[0] == "import":
            assert main(["export", str(run), "exported"]) == 0
        command = [str(run) if word == "runs/quickstart" else word for word in command]
    if command[0] == "share":
        small = ["sentences=4", "tokens=16", "max_tokens=100", "speed_repeats=0"]
        command = [*command[:1], str(request.getfixturevalue("trained") / "run"), str(tmp_path / "out"), *command[3:]]
        command += small
    if command[0] in ("evaluate", "generate"):
        command = [command[0], str(request.getfixturevalue("trained") / "run"), *command[2:]]
    if "--suite" in command:
        command += [f"out={tmp_path}", "perplexity.sliding.stride=16"]  # rows of that run have 32 tokens
        command += [f"{name}.max_tokens=100" for name in ("perplexity.sliding", "perplexity.disjoint", "decode.caches")]
    if command[0] == "bench":
        command = [*command, *SMALL[1:2], "model.vocab_size=64", "caches=full", "lengths=[[4,4]]", "batches=1",
                   f"out={tmp_path / 'bench'}"]  # fmt: skip
    if command[0] == "train":
        for number in (1, 2):
            (tmp_path / "books").mkdir(exist_ok=True)
            (tmp_path / "books" / f"{number}.txt").write_text(README * 3, encoding="utf-8")
        sources = [f"data.sources=[{tmp_path}/books/**/*.txt]"]
        command = [*command, *SMALL, *sources, f"out={tmp_path / 'run'}", f"data.folder={tmp_path / 'data'}"]
    assert main(command) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", LAUNCHED, ids=" ".join)
def test_launched_command_runs(line, tmp_path):
    words = [sys.executable if word == ".venv/bin/python" else word for word in line[1:]]
    if "train" in words:
        words += [
            *SMALL,
            "data.sources=README.md",
            "data.validation=docs/*.md",
            "data.tokenizer=bytes",
            f"out={tmp_path}",
        ]
        words += [f"data.folder={tmp_path / 'data'}"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("done: 2 steps" if "train" in words else "2 process(es)") in done.stdout


def test_make_targets_are_the_plain_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in LINES:
        if line[0] == "make":
            assert re.search(rf"^{line[1]}:", makefile, re.M), line
    plain = {" ".join(line).replace(".venv/bin", "$(BIN)") for line in LINES}
    assert {"$(BIN)/python -m lckv_jax train configs/quickstart.yaml", "$(BIN)/python -m pytest -n auto"} <= plain
    for command in ("$(BIN)/python -m lckv_jax train configs/quickstart.yaml", "$(BIN)/python -m pytest -n auto"):
        assert f"\t{command}\n" in makefile
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`((?:configs|tests|benchmarks)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]*)[^)]*\)", text):
        assert not target or ((ROOT / page).parent / target).exists(), target
