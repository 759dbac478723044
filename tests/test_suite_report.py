"""results.json and results.md: what was measured, how exactly and by what, and numbers that any reader takes."""

import json
import math
import re
from pathlib import Path

import jax
import pytest
from small_runs import run_config

from lckv_jax.config import MeshConfig
from lckv_jax.errors import UserError
from lckv_jax.evaluate import suite_report
from lckv_jax.evaluate.perplexity import plain
from lckv_jax.evaluate.suite_entries import Subject
from lckv_jax.evaluate.tasks import ExactDifference, TaskResult
from lckv_jax.evaluate.windows import DocumentScore, Estimate, PositionScore, WindowReport
from lckv_jax.parallel.mesh import make_mesh


def a_subject(passes="trained", **model):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Subject({}, run_config(**model), None, 9, "f" * 64, mesh, passes, Path("out"), None)


def a_record(kind, name, found, settings=None, data=None):
    settings = {"seq_len": 32, "stride": 8, "prompt_tokens": None, "max_length": 64} | (settings or {})
    return {
        "kind": kind, "name": name, "settings": settings, "data": data or {"a.txt": "a" * 64}, "results": plain(found),
        "seconds": 1.5, "made": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip


def windows(**changes):
    documents = tuple(DocumentScore(n, f"{n}.txt", 10, n / 4, math.exp(n / 4), 30, 0.5) for n in range(12))
    positions = (PositionScore(0, 8, 60, Estimate(2.0, 0.1), Estimate(7.389, 0.7)),)
    report = WindowReport(
        tokens=1200, documents=12, windows=40, bytes=3600, nats=Estimate(1.5, 0.25), perplexity=Estimate(4.482, 1.120),
        bits_per_byte=Estimate(0.7213, 0.01), clusters=12, clustered_over="documents", mean_passes=9.0, max_passes=9,
        residual=0.001, by_position=positions, by_document=documents,
    )  # fmt: skip
    return report._replace(**changes)


def a_task(**changes):
    difference = ExactDifference(50, 1e-4, 2e-3, 3, {"acc": (0.5, 0.52)})
    result = TaskResult(
        task="piqa", items=60, metrics={"acc": (0.55, 0.0642), "perplexity": (2.5e9, None)}, chance=0.5, cut=7,
        seconds=3.0, compilations=2, data="piqa.jsonl", sha256="b" * 64, version="1.0", passes="trained", exact=False,
        exact_difference=difference,
    )  # fmt: skip
    return result._replace(**changes)


def written(folder, records, subject=None, missing=()):
    head = suite_report.facts("runs/x", "some.yaml", ["tasks.limit=5"], {"passes": "trained"}, subject or a_subject())
    suite_report.write_report(folder, {**head, "missing": list(missing), "entries": records})
    found = json.loads((folder / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    return found, (folder / "results.md").read_text()


def row(page, start):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_head_tells_what_was_measured_and_by_what(tmp_path, monkeypatch):
    monkeypatch.setattr(suite_report, "commit", lambda: "1a2b3c4-dirty")
    found, page = written(tmp_path, [a_record("perplexity", "books", windows())])
    assert "| suite | some.yaml `tasks.limit=5` |" in page and found["suite"]["overrides"] == ["tasks.limit=5"]
    assert found["checkpoint"]["step"] == 9 and found["checkpoint"]["sharing"] == "0_2_2_3"
    assert found["checkpoint"]["model"]["hidden_size"] == 16
    assert (found["code"]["commit"], found["code"]["dirty"]) == ("1a2b3c4", True)
    assert found["versions"]["jax"] == jax.__version__ and "lm-eval" in found["versions"]
    assert found["passes"] == {"asked": "trained", "trained": [7, 2], "exact": False}
    assert row(page, "passes")[1] == "trained (7 + 2): not exact"
    assert row(page, "code")[1].endswith("commit 1a2b3c4, with changes that are not committed")
    assert row(page, "perplexity books")[-1] == "a" * 16
    assert found["entries"][0]["data"] == {"a.txt": "a" * 64}


@pytest.mark.parametrize(
    ("passes", "model", "exact", "words"),
    [
        ("exact", {}, True, "exact: exact"),
        (0.0, {}, True, "tolerance 0.0: exact"),
        (1e-2, {}, False, "tolerance 0.01: not exact"),
        ("trained", {"sharing": "standard"}, True, "trained (7 + 2): exact"),
    ],
)
def test_whether_passes_are_exact(tmp_path, passes, model, exact, words):
    found, page = written(tmp_path, [], a_subject(passes, **model))
    assert found["passes"]["exact"] is exact
    assert row(page, "passes")[1] == words


def test_a_tree_without_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(suite_report, "commit", lambda: None)
    found, _ = written(tmp_path, [])
    assert (found["code"]["commit"], found["code"]["dirty"]) == (None, None)


def test_windows_in_the_page(tmp_path):
    _, page = written(tmp_path, [a_record("perplexity", "books", windows())])
    line = row(page, "books")
    assert line[1:5] == ["4.482 ± 1.120", "1.5000 ± 0.2500", "0.7213 ± 0.0100", "1,200"]
    assert line[6:9] == ["32", "8", "12 documents"]
    assert row(page, "0 - 7")[1:] == ["7.389 ± 0.700", "2.0000 ± 0.1000", "60"]
    assert [row(page, rank)[1] for rank in (1, 12)] == ["0.txt", "11.txt"]  # the easiest and the hardest


def test_numbers_that_do_not_exist_are_null_and_unknown(tmp_path):
    report = windows(
        nats=Estimate(800.0, None),
        perplexity=Estimate(math.inf, None),
        bits_per_byte=None,
        by_document=(),
        by_position=(),
    )
    found, page = written(tmp_path, [a_record("perplexity", "books", report)])
    assert found["entries"][0]["results"]["perplexity"] == {"value": None, "stderr": None}
    assert row(page, "books")[1:4] == ["unknown", "800.0000", "unknown"]


def test_tasks_in_the_page(tmp_path):
    _, page = written(tmp_path, [a_record("task", "piqa", a_task())])
    lines = [line for line in page.splitlines() if line.startswith("| piqa |")]
    assert lines[0] == "| piqa | acc | 0.5500 ± 0.0642 | 0.5000 | 60 | 7 |"
    assert lines[1] == "| piqa | perplexity | 2.500e+09 | 0.5000 | 60 | 7 |"
    assert lines[2] == "| piqa | 50 | 1.00e-04 | 2.00e-03 | 3 | acc 0.5000, 0.5200 |"
    assert "more than 64 tokens are cut" in page
    _, exact = written(tmp_path, [a_record("task", "piqa", a_task(exact=True, exact_difference=None))])
    assert "exact passes change" not in exact


def test_every_table_has_as_many_cells_as_its_head(tmp_path):
    caches = {
        "text": "x",
        "bytes": 9,
        "caches": [
            {"cache": "full", "tokens": 9, "nats": 1.0, "stderr": None, "perplexity": 2.7, "bits_per_byte": None,
             "row_bytes": 9, "tokens_per_second": None,
             "positions": [{"start": 0, "stop": 8, "tokens": 9, "nats": 1.0, "perplexity": 2.7}]},
        ],
    }  # fmt: skip
    many = {f"{n}|.txt": str(n) * 64 for n in range(3)}
    records = [
        a_record("perplexity", "books", windows(), data=many),
        a_record("decode", "caches", caches),
        a_record("task", "piqa", a_task()),
    ]
    _, page = written(tmp_path, records, missing=["task boolq"])
    assert "Not measured yet: task boolq." in page and "3 files" in page
    blocks = re.findall(r"(?:^\|.*\n)+", page, re.M)
    assert len(blocks) == 9
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "results.md.partial").mkdir()
    with pytest.raises(UserError, match="cannot be written: Is a directory; mend that and run the same command again"):
        written(tmp_path, [])


def test_an_entry_in_a_line():
    line = suite_report.one_line(a_record("perplexity", "books", windows()))
    assert line == "perplexity books: perplexity 4.482 ± 1.120, 0.7213 ± 0.0100 bits/byte, 1,200 tokens"
    line = suite_report.one_line(a_record("task", "piqa", a_task()))
    assert line == "task piqa: acc 0.5500 ± 0.0642, perplexity 2.500e+09, 60 items"
