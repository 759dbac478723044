"""The commands, the code and the settings of docs/share.md, as written, on a small run."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest

from lckv_jax.__main__ import main
from lckv_jax.share.share_config import ShareConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "share.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
SPEC = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "run", tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_command(line, place, capsys):
    words = shlex.split(line)
    command = words[words.index("lckv_jax") + 1 :]
    small = ["sentences=4", "tokens=16", "max_tokens=100", "speed_repeats=0"]
    if "prompt_tokens=128" in command:
        command[command.index("prompt_tokens=128")] = "prompt_tokens=24"
    if "--heal" in command:
        command[command.index("--heal") + 1] = "2"
    assert main([*command, *small]) == 0
    assert "3" in capsys.readouterr().out


def test_code(place, capsys):
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)), {})
    assert "0_2_2_" in capsys.readouterr().out


def test_the_reference_is_up_to_date():
    assert reference.page_with_reference(PAGE, ShareConfig) == PAGE, "run: python -m docs.reference"
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) >= set(ShareConfig.model_fields)
    assert all(field.description for field in ShareConfig.model_fields.values())
