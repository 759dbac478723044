"""A picture of -log p over the position in the text, one curve for each cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lckv_jax.errors import UserError
from lckv_jax.evaluate.cache_quality import CacheReport

_FORMATS = (".png", ".svg", ".pdf")


def check_format(plot: str) -> None:
    """Raises UserError for a file whose ending is of no known picture."""
    if Path(plot).suffix.lower() not in _FORMATS:
        raise UserError(f"plot: {plot} ends in none of {', '.join(_FORMATS)}; write, for example, plot=positions.png")


def draw_positions(reports: Sequence[CacheReport], path: Path, *, trained: int) -> None:
    """Writes the mean -log p of each bucket of positions under each cache, in nats; PNG, SVG or PDF by the ending.

    trained: tokens of a row in training, marked where text goes on beyond them. Raises UserError if the file cannot be
    written.
    """
    from matplotlib.figure import Figure  # half a second to import, and only needed here

    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for report in reports:
        edges = [report.positions[0].start, *(bucket.stop for bucket in report.positions)]
        label = f"{report.cache}: {report.nats:.2f} nats, {report.row_bytes:,} bytes"
        axes.stairs([bucket.nats for bucket in report.positions], edges, baseline=None, label=label, linewidth=1.2)
    last = max(bucket.stop for report in reports for bucket in report.positions)
    if trained < last:
        axes.axvline(trained, color="#8a93a3", linewidth=0.9, linestyle="--", label=f"trained on rows of {trained:,}")
    axes.set(xlabel="position of the newest token", ylabel="-log p of the next token, nats", xlim=(0, last))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("Token by token, by what the cache keeps", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8.5)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; the numbers are in `out`") from error
