"""The commands and settings of docs/benchmark.md can be read."""

import re
import shlex
from pathlib import Path

import pytest

from lckv_jax.decode.bench_config import load_bench_config

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
COMMANDS = [line.split("lckv_jax ")[1] for line in re.findall(r"^.*lckv_jax bench .*$", PAGE, re.M)]
SETTINGS = [" ".join(text.split()) for text in re.findall(r"`((?:bench |caches=|\"lengths=)[^`]*)`", PAGE)]


@pytest.mark.parametrize("text", [*COMMANDS, *SETTINGS])
def test_settings_can_be_read(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(text)
    path, settings = (words[1], words[2:]) if words[0] == "bench" else ("configs/bench/50m.yaml", words)
    assert load_bench_config(path, settings).maps


def test_there_are_commands_and_settings():
    assert COMMANDS and len(SETTINGS) >= 3


@pytest.mark.parametrize("name", re.findall(r"\]\((\S+\.png)\)", PAGE))
def test_pictures_are_there(name):
    assert (ROOT / "docs" / name).is_file()
