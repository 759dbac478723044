"""docs/evaluate.md: its settings are those of the code, its commands run, its suites can be read."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from test_docs_training import commands, reference

from lckv_jax.__main__ import main
from lckv_jax.config import build_config
from lckv_jax.evaluate.suite_config import SuiteConfig, load_suite

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
SUITES = sorted((ROOT / "configs" / "suites").glob("*.yaml"))


def test_the_reference_is_up_to_date():
    assert reference.page_with_reference(PAGE, SuiteConfig) == PAGE, "run: python -m docs.reference"


def test_every_field_has_a_description_and_a_row():
    keys = set(re.findall(r"^\| `([\w.]+)` \|", PAGE, re.M))
    for path, model in reference.sections(SuiteConfig, ""):
        assert model.__doc__, model
        for name, field in model.model_fields.items():
            assert field.description, name
            inner = any(other.startswith(f"{path}{name}.") for other, _ in reference.sections(SuiteConfig, ""))
            assert f"{path}{name}" in keys or path.endswith("files.") or (inner and not path), f"{path}{name}"


@pytest.mark.parametrize("command", commands(PAGE), ids=" ".join)
def test_command_runs(command, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = [str(trained / "run") if word == "runs/quickstart" else word for word in command]
    words += ["max_tokens=100"]
    if "--suite" in words:
        words[-1:] = [f"out={tmp_path}", "perplexity.sliding.max_tokens=100", "perplexity.disjoint.max_tokens=100",
                      "perplexity.sliding.stride=16", "decode.caches.max_tokens=100"]  # fmt: skip
    assert main(words) == 0
    assert capsys.readouterr().out


def test_the_suite_on_the_page_can_be_read():
    (suite,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    wanted = build_config(SuiteConfig, yaml.safe_load(suite), "docs/evaluate.md")
    assert list(wanted.perplexity) == ["validation", "books"]


def test_the_tasks_on_the_page_are_those_of_the_files():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", PAGE, re.M))
    files = {
        path.stem: yaml.safe_load(re.sub(r"!function", "", path.read_text()))
        for path in (ROOT / "configs" / "eval").glob("*.yaml")
    }
    assert rows.keys() == files.keys()
    for name, file in files.items():
        (data,) = file["dataset_kwargs"]["data_files"].values()
        assert data.removesuffix(".gz") == rows[name]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_shipped_suites(path):
    """They can be read, their headers have a command that names them, and the page names them."""
    wanted = load_suite(path)
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    name = f"configs/suites/{path.name}"
    assert f"--suite {name}" in header and f"`{name}`" in PAGE
    assert all(word in header for word in ("Hardware:", "Time:", "Expect:"))
    command = shlex.split(re.search(r"python -m lckv_jax evaluate (.*)", header)[1])
    assert load_suite(path, [word for word in command if "=" in word])
    assert all((ROOT / "configs" / "eval" / f"{task}.yaml").exists() for task in wanted.tasks.names)
