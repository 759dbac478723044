"""metrics.jsonl after a kill, the progress line, the loss curve."""

import io
import math

import pytest
from rich.console import Console

from lckv_jax.train.metrics import MetricsFile, ProgressLine, draw_loss_curve, progress_text, read_metrics

RECORD = {"step": 12, "loss": 3.25, "tokens_per_second": 1234.5, "passes": 9, "residual": 1e-3, "skipped": 0}


def test_a_torn_line_and_lost_work_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    file = MetricsFile(path, 1)
    file.write({"step": 2, "loss": 1.5})
    file.close()
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_the_progress_line():
    line = progress_text(RECORD, 500, 61.0)
    assert line == "step  12/500  loss 3.2500    1,234 tok/s  passes 9  residual 1.0e-03  eta 1:01"
    assert "mfu 41.2%" in progress_text({**RECORD, "mfu": 0.4123}, 500, 61.0)
    assert "skipped" not in line
    assert "skipped 2" in progress_text({**RECORD, "skipped": 2}, 500, 61.0)


def test_a_long_run_still_tells_its_residual():
    assert "residual 1.0e-03" in progress_text({**RECORD, "step": 100_000}, 250_000, 1e6)


@pytest.mark.parametrize("extra", [{}, {"mfu": 0.4123}, {"skipped": 12}, {"mfu": 0.9, "skipped": 3}])
@pytest.mark.parametrize("loss", [3.25, 1e30, math.nan])
@pytest.mark.parametrize("step", [7, 1_000_000])
def test_it_fits_a_terminal_and_keeps_what_matters(extra, loss, step):
    record = {**RECORD, "step": step, "loss": loss, "tokens_per_second": 12_345_678.9, "passes": 64, **extra}
    line = progress_text(record, 1_000_000, 1e6, width=80)
    assert len(line) < 80
    assert f"{step}/1000000" in line and "loss" in line
    if loss < 100:
        assert "eta 277:46:40" in line and "tok/s" in line
        assert ("skipped" in line) == ("skipped" in extra)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_shown(value):
    stream = io.StringIO()
    line = ProgressLine(Console(file=stream, width=80), 0, 20, 1)
    record = dict.fromkeys(("loss", "tokens_per_second", "residual", "mfu"), value)
    for step in (1, 2):
        line.update({**RECORD, **record, "step": step})
    line.close()
    assert stream.getvalue().count(f"loss {value:.4f}") == 2


def test_the_loss_curve_of_any_records(tmp_path):
    records = [{"step": 1, "loss": None, "tokens_seen": 8}, {"step": 2, "loss": 2.0, "tokens_seen": 16}]
    for told in ([], records, [*records, {"step": 2, "valid_loss": 2.5, "tokens_seen": 16}]):
        draw_loss_curve(told, 512, tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"absent.loss\.png"):
        draw_loss_curve([], 512, tmp_path / "absent" / "loss.png")
    (tmp_path / "full.png").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"full\.png"):
        draw_loss_curve([], 512, tmp_path / "full.png")
