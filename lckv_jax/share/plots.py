"""Pictures of a search: the distances as a heat map, and perplexity over the number of shared layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lckv_jax.errors import UserError
from lckv_jax.share.kvsharer import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"dissimilar": "#2d6aa8", "similar": "#c8442f", "random": "#8a93a3"}
_LEAST_WIDTH, _CELL = 4.4, 0.33  # inches


def draw_distances(result: Result, title: str, path: Path) -> None:
    """The distance of each owner from the lower ones; the accepted pairs are numbered, a rejected one has a cross."""
    from matplotlib.figure import Figure  # half a second to import, and only needed here

    size = max(_LEAST_WIDTH, _CELL * len(result.distances) + 1.6)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(result.distances), cmap="viridis", origin="lower")
    figure.colorbar(image, ax=axes, shrink=0.8, label="distance of mean keys and values")
    number = 0
    for trial in result.tried:
        number += trial.accepted
        text = str(number) if trial.accepted else "x"
        axes.text(trial.lo, trial.hi, text, ha="center", va="center", color="white", weight="bold", fontsize=9,
                  bbox={"boxstyle": "circle,pad=0.15", "facecolor": "#3b4250", "edgecolor": "none"})  # fmt: skip
    axes.set(xlabel="lower layer, whose K,V would be read", ylabel="layer that would give up its K,V")
    axes.set_xticks(range(len(result.distances)))
    axes.set_yticks(range(len(result.distances)))
    axes.tick_params(labelsize=8)
    axes.set_title(title, loc="left", fontsize=10)
    _save(figure, path)


def draw_sweep(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], title: str, path: Path) -> None:
    """Perplexity over the number of shared layers: for each order its curves of (number, perplexity)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for order, lines in curves.items():
        style = {"color": _COLORS[order], "marker": "o", "markersize": 4, "lw": 1.2 if len(lines) > 1 else 2.0}
        for number, points in enumerate(lines):
            label = order if len(lines) == 1 else f"{order}, {len(lines)} seeds"
            axes.plot(
                *zip(*points), label=label if number == 0 else None, alpha=0.7 if len(lines) > 1 else 1.0, **style
            )
    axes.set_yscale("log")
    values = [value for lines in curves.values() for points in lines for _, value in points]
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    wide = max(values) > 20 * min(values)  # else the powers of ten alone would leave the axis bare
    axes.yaxis.set_minor_formatter(NullFormatter() if wide else StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layers that gave up their K,V", ylabel="perplexity on held-out text (log scale)")
    axes.grid(alpha=0.3, which="both")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; mend that and run the command again") from error
