"""Pictures of `bench` results: throughput, share of the roofline, capacity, and streaming caches."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lckv_jax.decode.spec import CacheSpec
from lckv_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Record = dict[str, Any]  # of a cell: identity, facts, results or None, error or None
Key = TypeVar("Key")
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GOOD = 0.6  # of the roofline, in plots
_TITLE_LETTERS = 11.5  # for each inch
_OURS, _BAR, _EDGE = "lckv_jax", "#2d6aa8", "#3b4250"
_RATES = {"tokens_per_s": "new tokens/s, prompt included", "decode_tokens_per_s": "decode tokens/s"}


class Setting(NamedTuple):
    """What must be equal in one picture. cap: bytes of memory that another card is emulated with, or None."""

    device: str
    dtype: str
    prompt: int
    new: int
    cap: int | None

    @property
    def title(self) -> str:
        """Device, lengths, and what the reader must not overlook."""
        cap = "" if self.cap is None else f", emulated: {self.cap / 1e9:g} GB"
        return f"{self.device}{cap}, random weights, {self.dtype}, {self.prompt:,}+{self.new:,} tokens"


def plot(results: list[Record], folder: Path) -> list[Path]:
    """Draws what there is to see in the records of cells into PNG files in `folder`; cells with an error are left out.

    For each device, dtype, lengths and memory cap: for each cache `throughput` and `roofline` over the batch, where
    there are two batches; `capacity` where largest batches are known; `streaming` where caches have sinks. Returns the
    paths written.
    Raises UserError if one cannot be written.
    """
    written = []
    for name, figure in figures(results).items():
        path = folder / f"{name}.png"
        try:
            figure.savefig(path, dpi=110)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}; choose another folder") from error
        written.append(path)
    return written


def figures(results: Iterable[Record]) -> dict[str, Figure]:
    """The pictures of `plot` by the names of their files."""
    good = [record for record in results if record["results"]]
    settings = _grouped(good, _setting)
    drawn: dict[str, Figure] = {}
    for setting, records in settings.items():
        end = _file_end(setting, settings)
        for cache, same_cache in _grouped(records, lambda record: record["identity"]["cache"]).items():
            of_cache = "" if cache == "full" else f"-{_slug(cache)}"
            title = setting.title if cache == "full" else f"{setting.title}, cache {cache}"
            if len(set(map(_batch, same_cache))) == 1:
                continue  # no curve
            drawn[f"throughput-{end}{of_cache}"] = _draw_throughput(same_cache, title)
            if any(record["results"]["share_of_roofline"] is not None for record in same_cache):
                drawn[f"roofline-{end}{of_cache}"] = _draw_roofline(same_cache, title)
        if largest := [record for record in records if record["results"]["largest"]]:
            drawn[f"capacity-{end}"] = _draw_capacity(largest, setting.title)
        if streaming := [record for record in records if _streams(record)]:
            drawn[f"streaming-{end}"] = _draw_streaming(streaming, setting.title)
    return drawn


# ---------------------------------------------------------------- what belongs together


def _grouped(records: Iterable[Record], key: Callable[[Record], Key]) -> dict[Key, list[Record]]:
    groups: dict[Key, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _setting(record: Record) -> Setting:
    identity = record["identity"]
    lengths = identity["prompt"], identity["new"]
    return Setting(record["facts"]["device"], identity["dtype"], *lengths, identity["memory_cap_bytes"])


def _file_end(setting: Setting, settings: Iterable[Setting]) -> str:
    """The lengths, and of the rest what another setting has otherwise."""
    parts = [f"{setting.prompt}+{setting.new}"]
    if setting.cap is not None:
        parts.append(f"{setting.cap / 1e9:g}GB")
    parts += [_slug(str(x)) for x, others in zip(setting[:2], list(zip(*settings))[:2]) if len(set(others)) > 1]
    return "-".join(parts)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def _name(record: Record) -> str:
    """What is compared: the map's name, and where it is not our decoder or not the usual passes, these."""
    identity = record["identity"]
    name = identity["model"] if identity["decoder"] == _OURS else f"{identity['model']}, {identity['decoder']}"
    return name if identity["passes"] == "trained" else f"{name}, passes {identity['passes']}"


def _is_standard(record: Record) -> bool:
    """Whether this is our decoder with the standard map and a full cache, which ratios are to."""
    identity = record["identity"]
    standard = "_".join(str(layer) for layer in range(identity["sharing"].count("_") + 1))
    return (identity["decoder"], identity["sharing"], identity["cache"]) == (_OURS, standard, "full")


def _streams(record: Record) -> bool:
    """Whether the cell belongs to a curve over the size of a streaming cache: sinks, and a batch that was given."""
    return CacheSpec.parse(record["identity"]["cache"]).policy == "sinks" and not record["results"]["largest"]


# ---------------------------------------------------------------- pictures


def _panels(number: int, title: str, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # half a second to import, and only needed here

    figure = Figure(figsize=(4.4 * number + 0.4 if number > 1 else 6.6, height), layout="constrained")
    axes = list(figure.subplots(1, number, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    lines = textwrap.wrap(title, round(_TITLE_LETTERS * figure.get_figwidth()), break_on_hyphens=False)
    figure.suptitle("\n".join(lines), fontsize="medium")
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 90 // (6 + max(map(len, labels)))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _curves(records: Sequence[Record]) -> Iterator[tuple[str, list[Record], dict[str, Any]]]:
    """Of each curve over the batch: its name, its records in order, and how it is drawn: colours tell models."""
    models = list(_grouped(records, lambda record: record["identity"]["model"]))
    for name, points in _grouped(records, _name).items():
        same_model = [r for r in records if r["identity"]["model"] == points[0]["identity"]["model"]]
        nth = list(_grouped(same_model, _name)).index(name)
        color = f"C{models.index(points[0]['identity']['model']) % 10}"
        style = {"color": color, "ls": _STYLES[nth % len(_STYLES)], "marker": _MARKERS[nth % len(_MARKERS)]}
        yield name, sorted(points, key=_batch), {**style, "ms": 4, "lw": 1.4}


def _batch(record: Record) -> int:
    return record["identity"]["batch"]


def _over_batch(axes: Axes, records: Sequence[Record], value: Callable[[Record], float | None]) -> None:
    """One line for each map and decoder; a star where the batch is the largest that fits."""
    for name, points, style in _curves(records):
        known = [(_batch(r), y, r["results"]["largest"]) for r in points if (y := value(r)) is not None]
        axes.plot([x for x, _, _ in known], [y for _, y, _ in known], label=name, **style)
        for x, y, largest in known:
            if largest:
                axes.plot([x], [y], "*", color=style["color"], ms=13, mec="white", mew=0.6, zorder=3)
                axes.annotate(
                    f"{x:,}", (x, y), xytext=(0, -13), textcoords="offset points", ha="center", fontsize="x-small"
                )
    if any(record["results"]["largest"] for record in records):
        axes.plot([], [], "*", color="0.4", ms=11, label="largest batch that fits")
    axes.set_xscale("log", base=2)
    _log_ticks(axes.xaxis, axes.get_xlim(), base=2, subs=(1,), whole=True)
    axes.set_xlabel("batch (rows)")


def _log_ticks(axis: Axis, limits: tuple[float, float], *, base: int, subs: tuple[int, ...], whole: bool) -> None:
    """Plain numbers, several of them however near the limits are. whole: of something that is counted."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    wide = limits[1] > 8 * limits[0]
    axis.set_major_locator(LogLocator(base, subs) if wide else MaxNLocator(6, steps=[1, 2, 5, 10], integer=whole))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))


def _draw_throughput(records: Sequence[Record], title: str) -> Figure:
    figure, panels = _panels(2, title)
    for axes, (key, label) in zip(panels, _RATES.items()):
        _over_batch(axes, records, lambda record, key=key: record["results"][key])
        axes.set_ylabel(label)
        axes.set_yscale("log")  # as the batch: equal ratios are equal distances
        _log_ticks(axes.yaxis, axes.get_ylim(), base=10, subs=(1, 2, 5), whole=False)
    _legend(figure, panels[0])
    return figure


def _draw_roofline(records: Sequence[Record], title: str) -> Figure:
    from matplotlib.ticker import PercentFormatter

    figure, [axes] = _panels(1, title)
    _over_batch(axes, records, lambda record: record["results"]["share_of_roofline"])
    axes.axhline(1.0, color="0.6", lw=1, zorder=0, label="100 %: all of the copy bandwidth")
    axes.axhline(_GOOD, color="0.6", lw=1, ls=(0, (4, 2)), zorder=0, label=f"{100 * _GOOD:.0f} %: a good share")
    axes.set_ylim(0, max(1.05, 1.05 * axes.dataLim.ymax))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("share of the roofline of a decode step")
    _legend(figure, axes)
    return figure


def _draw_capacity(records: Sequence[Record], title: str) -> Figure:
    """A bar for each map and cache, and how many times the standard map's with a full cache it is."""
    several = len(_grouped(records, lambda record: record["identity"]["cache"])) > 1
    bars = _grouped(
        records, lambda record: f"{_name(record)}, {record['identity']['cache']}" if several else _name(record)
    )
    batches = [max(map(_batch, group)) for group in bars.values()]
    standard = max((_batch(record) for record in records if _is_standard(record)), default=None)
    figure, [axes] = _panels(1, title, height=1.3 + 0.34 * len(bars))
    shown = axes.barh(list(bars), batches, color=_BAR, height=0.65)
    ratios = [f"{batch:,}" + ("" if standard is None else f"  x{batch / standard:.3g}") for batch in batches]
    axes.bar_label(shown, ratios, padding=4, fontsize="small", color=_EDGE)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("largest batch that fits" + ("" if standard is None else "; x: to the standard map, full cache"))
    return figure


def _draw_streaming(records: Sequence[Record], title: str) -> Figure:
    """Time for a token and memory over the tokens that the cache keeps; one curve for each map, codec and batch."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    batches = set(map(_batch, records))
    figure, (latency, memory) = _panels(2, title if len(batches) > 1 else f"{title}, batch {min(batches):,}")

    def curve(record: Record) -> str:
        codec = str(CacheSpec.parse(record["identity"]["cache"])).partition("+")[2]
        name = f"{_name(record)}, {codec}" if codec else _name(record)
        return f"{name}, batch {_batch(record):,}" if len(batches) > 1 else name

    for number, (name, group) in enumerate(_grouped(records, curve).items()):
        points = sorted(group, key=_cells)
        x, color, results = list(map(_cells, points)), f"C{number % 10}", [record["results"] for record in points]
        steps = [result["decode_step_ms"] for result in results]
        low, high = ([abs(step[end] - step["median"]) for step in steps] for end in ("min", "max"))
        latency.errorbar(x, [step["median"] for step in steps], [low, high], color=color, fmt="o-", ms=4, lw=1.4,
                         capsize=2, label=name)  # fmt: skip
        memory.plot(x, [result["cache_bytes_held"] for result in results], f"{color}o-", ms=4, lw=1.4, label="cache")
        peaks = [(cells, peak) for cells, result in zip(x, results) if (peak := result["peak_bytes"]) is not None]
        if peaks:
            memory.plot(*zip(*peaks), f"{color}s--", ms=4, lw=1.4, label="peak")
    latency.set(xlabel="tokens the cache keeps", ylabel="ms a token", ylim=(0, None))
    memory.set(xlabel="tokens the cache keeps", ylabel="memory: cache (solid), peak (dashed)", yscale="log")
    low, high = memory.dataLim.intervaly
    memory.set_ylim(10 ** math.floor(math.log10(0.99 * low)), 10 ** math.ceil(math.log10(1.01 * high)))
    memory.yaxis.set_major_formatter(EngFormatter(unit="B"))
    memory.yaxis.set_minor_formatter(NullFormatter())
    _legend(figure, latency)
    return figure


def _cells(record: Record) -> int:
    """Tokens that a streaming cache keeps: sinks and window."""
    spec = CacheSpec.parse(record["identity"]["cache"])
    return spec.sinks + spec.window
