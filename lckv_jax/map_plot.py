"""A picture of a sharing map: who computes K,V, who reads whom, what is windowed, what is solved by passes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lckv_jax.config import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.sharing import KVSharing

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_OWNER, _READER, _EDGE = "#f2b84b", "#eef1f5", "#3b4250"
_UP, _DOWN, _SPAN, _SPAN_FACE, _WINDOWED = "#c8442f", "#2d6aa8", "#7a5ea8", "#f6f2fb", "#8a93a3"
_DASHES = (0, (4, 2))
_WIDTH, _HEIGHT = 2.6, 0.72  # of a layer's box, in the units of one layer


class Bus(NamedTuple):
    """The readers above or below one source, drawn as one vertical line in a lane of its own, right of the layers."""

    source: int
    readers: tuple[int, ...]
    lane: int


def buses(sharing: KVSharing) -> list[Bus]:
    """Who reads whom as buses, one a source that others read; short ones lie inside, and none lies on another."""
    found: list[Bus] = []
    groups = [(source, sharing.donors(sharing.owners.index(source))) for source in sharing.shared_owners]
    for source, donors in sorted(groups, key=lambda group: max(*group[1], group[0]) - min(*group[1], group[0])):
        low, high = min(*donors, source), max(*donors, source)
        taken = {
            bus.lane for bus in found if min(*bus.readers, bus.source) <= high and max(*bus.readers, bus.source) >= low
        }
        readers = tuple(layer for layer in donors if layer != source)
        found.append(Bus(source, readers, min(set(range(len(found) + 1)) - taken)))
    return found


def draw_map(model: ModelConfig, path: Path) -> None:
    """Writes a picture of the model's sharing map: PNG, SVG or PDF, by the ending of `path`.

    Raises UserError for another ending, or if the file cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import, and only needed here

    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--plot {path}: the file ends in {', '.join(FORMATS)}; write, for example, --plot map.png")
    sharing = model.sharing
    lanes = 1 + max((bus.lane for bus in buses(sharing)), default=-1)
    left = 1.3 if sharing.cyclic else 0.2
    width, height = 3.2 + 0.4 * left + 0.45 * lanes, max(3.2, 0.34 * sharing.num_layers + 1.9)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(-left, _WIDTH + 0.9 * lanes + 0.4), ylim=(-0.7, sharing.num_layers - 0.2))
    _draw_spans(axes, sharing, model)
    _draw_layers(axes, sharing)
    _draw_buses(axes, sharing)
    held = f"{len(sharing.owners)} of {sharing.num_layers} layers keep keys and values"
    axes.set_title(held, loc="left", fontsize=11, color=_EDGE)
    _draw_legend(figure, sharing, model)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}; choose another file") from error


def _draw_layers(axes: Axes, sharing: KVSharing) -> None:
    from matplotlib.patches import FancyBboxPatch

    for layer in range(sharing.num_layers):
        owner, windowed = layer in sharing.owners, sharing.windowed[layer]
        box = FancyBboxPatch(
            (0, layer - _HEIGHT / 2), _WIDTH, _HEIGHT, boxstyle="round,pad=0,rounding_size=0.12", linewidth=1,
            facecolor=_OWNER if owner else _READER, edgecolor=_EDGE if not windowed else _WINDOWED,
            hatch="///" if windowed else None,
        )  # fmt: skip
        axes.add_patch(box)
        plain = {"boxstyle": "round,pad=0.15", "facecolor": box.get_facecolor(), "edgecolor": "none"}
        text = f"layer {layer}" + ("  K,V" if owner else "")
        axes.text(_WIDTH / 2, layer, text, ha="center", va="center", fontsize=8.5, color="#1d222b",
                  weight="bold" if owner else "normal", bbox=plain if windowed else None)  # fmt: skip


def _draw_buses(axes: Axes, sharing: KVSharing) -> None:
    for source, readers, lane in buses(sharing):
        x = _WIDTH + 0.7 + 0.9 * lane
        entry = {True: source - 0.16, False: source + 0.16}  # upward readers come in from below the source's middle
        both = len({sharing.upward[reader] for reader in readers}) == 2
        for upward, color in ((True, _UP), (False, _DOWN)):
            of_this_kind = [reader for reader in readers if sharing.upward[reader] == upward]
            if not of_this_kind:
                continue
            y = entry[upward] if both else source
            axes.plot([x, x], [y, min(of_this_kind) if upward else max(of_this_kind)], color=color, lw=1.6,
                      solid_capstyle="round", zorder=1)  # fmt: skip
            for reader in of_this_kind:
                axes.plot([_WIDTH, x], [reader, reader], color=color, lw=1.2, zorder=1)
            axes.annotate("", xy=(_WIDTH, y), xytext=(x, y), zorder=3,
                          arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.6, "shrinkA": 0,
                                      "shrinkB": 0})  # fmt: skip


def _draw_spans(axes: Axes, sharing: KVSharing, model: ModelConfig) -> None:
    from matplotlib.patches import FancyBboxPatch

    passes = f"{model.no_grad_passes} + {model.grad_passes} passes"
    for span in sharing.spans():
        if not span.cyclic:
            continue
        box = FancyBboxPatch(
            (-0.28, span.start - 0.47), _WIDTH + 0.56, span.stop - span.start - 0.06, zorder=0, linewidth=1.3,
            boxstyle="round,pad=0,rounding_size=0.2", facecolor=_SPAN_FACE, edgecolor=_SPAN, linestyle=_DASHES,
        )  # fmt: skip
        axes.add_patch(box)
        tall = span.stop - span.start >= 5
        text = passes if tall else passes.replace(" passes", "\npasses")
        axes.text(-0.45, (span.start + span.stop - 1) / 2, text, rotation=90 if tall else 0, ha="right", va="center",
                  fontsize=8.5, color=_SPAN)  # fmt: skip


def _draw_legend(figure: Figure, sharing: KVSharing, model: ModelConfig) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown: list[Artist] = [Patch(facecolor=_OWNER, edgecolor=_EDGE, label="computes its keys and values")]
    if len(sharing.owners) < sharing.num_layers:
        shown.append(Patch(facecolor=_READER, edgecolor=_EDGE, label="reads another layer's"))
    if any(sharing.upward):
        shown.append(Line2D([], [], color=_UP, lw=1.8, label="from above: strictly earlier tokens"))
    if any(sharing.sources[layer] < layer for layer in range(sharing.num_layers)):
        shown.append(Line2D([], [], color=_DOWN, lw=1.8, label="from below"))
    if any(sharing.windowed):
        label = f"sliding window of {model.window:,} tokens"
        shown.append(Patch(facecolor="white", edgecolor=_WINDOWED, hatch="///", label=label))
    if sharing.cyclic:
        shown.append(
            Patch(facecolor=_SPAN_FACE, edgecolor=_SPAN, linestyle=_DASHES, label="solved together by m + b passes")
        )
    figure.legend(handles=shown, loc="outside lower left", frameon=False, fontsize=8.5)
