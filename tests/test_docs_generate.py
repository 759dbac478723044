"""The commands and the code of docs/generate.md, as written, on a small run."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from lckv_jax.__main__ import main

PAGE = (Path(__file__).parent.parent / "docs" / "generate.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "run", tmp_path / "runs" / "quickstart")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "import os"}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_command(line, place, capsys):
    words = shlex.split(line)
    command = words[words.index("lckv_jax") + 1 :]
    limit = {"generate": "max_new_tokens=8", "evaluate": "max_tokens=100"}[command[0]]
    if not any(word.startswith(limit.partition("=")[0]) for word in command):
        command.append(limit)
    assert main(command) == 0
    assert capsys.readouterr().out.strip() or (place / "answers.jsonl").read_text().strip()


def test_code(place, capsys):
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)), {})
    assert capsys.readouterr().out
