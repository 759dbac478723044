"""Pictures of bench results: which files come out, and that lines and bars hold the numbers they were given."""

import copy

import pytest

from lckv_jax.decode.bench_plots import figures, plot
from lckv_jax.errors import UserError

STANDARD, LCKV = "0_1_2_3_4_5_6_7", "0_6_6_6_6_6_6_7"


def record(model="standard", batch=1, *, largest=False, cache="full", peak=3_000_000_000, scale=1.0, **identity):
    """A record in which every number depends on the batch and `scale`, so that mixed-up ones are seen."""
    step = 2.0 + batch / 100 * scale
    return {
        "identity": {
            "model": model, "decoder": "lckv_jax", "sharing": STANDARD if model == "standard" else LCKV, "cache": cache,
            "dtype": "bfloat16", "prompt": 512, "new": 512, "batch": batch, "passes": "trained",
            "memory_cap_bytes": None, **identity,
        },
        "facts": {"device": "NVIDIA H200", "random_weights": True},
        "results": {
            "decode_step_ms": {"median": step, "min": step - 0.5, "max": step + 0.25},
            "decode_tokens_per_s": 1000 * batch / step, "tokens_per_s": 700 * batch / step,
            "share_of_roofline": 0.5 + batch / 1000, "largest": largest, "cache_bytes_held": round(1e6 * batch * scale),
            "peak_bytes": peak,
        },
        "error": None,
    }  # fmt: skip


def failed(**identity):
    return {**record(**identity), "results": None, "error": "does not fit: needs 31.2 GB of 24.0 GB"}


GRID = [
    *(record("standard", batch) for batch in (8, 1, 32)),
    record("standard", 100, largest=True),
    *(record("lckv", batch, scale=0.5) for batch in (1, 8, 32)),
    record("lckv", 700, largest=True, scale=0.5),
    record("standard", 8, decoder="transformers dynamic"),
    failed(model="standard", batch=1000),
]


def line(axes, label):
    return next(drawn for drawn in axes.get_lines() if drawn.get_label() == label)


def points(axes, label):
    return [(x, pytest.approx(y)) for x, y in line(axes, label).get_xydata().tolist()]


def expected(name, key):
    good = [r for r in GRID if r["results"] and r["identity"]["model"] == name]
    ours = sorted((r for r in good if r["identity"]["decoder"] == "lckv_jax"), key=lambda r: r["identity"]["batch"])
    return [(r["identity"]["batch"], r["results"][key]) for r in ours]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_files_are_small_and_only_those_with_data(tmp_path):
    paths = plot(GRID, tmp_path)
    assert sorted(path.name for path in paths) == [f"{x}-512+512.png" for x in ("capacity", "roofline", "throughput")]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000 for path in paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_nothing_to_draw(tmp_path):
    assert plot([], tmp_path) == []
    assert plot([failed(), failed(model="lckv")], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_throughput_has_a_line_for_each_map_and_decoder():
    figure = figures(GRID)["throughput-512+512"]
    for axes, key in zip(figure.axes, ("tokens_per_s", "decode_tokens_per_s")):
        for name in ("standard", "lckv"):
            assert points(axes, name) == expected(name, key)
        [(batch, rate)] = points(axes, "standard, transformers dynamic")
        assert (batch, rate) == (8, GRID[-2]["results"][key])
        assert texts(axes) == ["100", "700"]  # the stars
        assert axes.get_xscale() == "log"
    title = " ".join(figure.get_suptitle().split())
    assert "NVIDIA H200" in title and "random weights" in title and "512+512 tokens" in title
    assert "emulated" not in title


def test_colours_tell_maps_and_strokes_tell_decoders():
    axes = figures(GRID)["throughput-512+512"].axes[0]
    standard, lckv, peer = (line(axes, name) for name in ("standard", "lckv", "standard, transformers dynamic"))
    assert standard.get_color() == peer.get_color() != lckv.get_color()
    assert standard.get_linestyle() == lckv.get_linestyle() != peer.get_linestyle()


def test_passes_are_lines_of_their_own():
    axes = figures([*GRID, record("lckv", 8, passes=0.01)])["throughput-512+512"].axes[0]
    assert len(points(axes, "lckv, passes 0.01")) == 1
    assert len(points(axes, "lckv")) == 4


def test_roofline_with_the_lines_that_tell_good_from_bad():
    [axes] = figures(GRID)["roofline-512+512"].axes
    assert points(axes, "lckv") == expected("lckv", "share_of_roofline")
    flat = sorted(y[0] for drawn in axes.get_lines() if len(set(y := drawn.get_ydata())) == 1 and len(y) == 2)
    assert flat == [0.6, 1.0]
    assert line(axes, "60 %: a good share").get_ydata()[0] == 0.6
    assert any(text.get_text().startswith("60 %") for text in axes.figure.legends[0].get_texts())
    assert axes.get_ylim()[1] > 1.2  # the largest share, 0.5 + 0.7, is inside
    unknown = [without(GRID[0], "share_of_roofline"), without(GRID[1], "share_of_roofline")]
    assert list(figures(unknown)) == ["throughput-512+512"]


@pytest.mark.parametrize(
    ("batches", "rates"),
    [((1, 2), (90.0, 130.0)), ((9, 11), (95.0, 115.0)), ((1, 700), (100.0, 80_000.0)), ((2, 9), (0.4, 0.9))],
)
def test_axes_have_numbers_enough_to_read_values_off(batches, rates):
    """However near or far the values are."""
    records = [record(batch=batch) for batch in batches]
    for given, rate in zip(records, rates):
        given["results"] |= {"tokens_per_s": rate, "decode_tokens_per_s": rate}
    figure = figures(records)["throughput-512+512"]
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis, limits, least in ((axes.xaxis, axes.get_xlim(), 2), (axes.yaxis, axes.get_ylim(), 3)):
            shown = [
                (at, label.get_text())
                for at, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels())
                if limits[0] <= at <= limits[1]
            ]
            assert least <= len(shown) <= 12, shown
            assert [float(text.replace(",", "")) for _, text in shown] == [pytest.approx(at) for at, _ in shown]


def test_titles_and_legends_are_inside_the_picture():
    records = [record(batch=batch, cache="sinks(4,1020)+int8", memory_cap_bytes=24_000_000_000) for batch in (1, 8)]
    records += [record("lckv", 900, largest=True, cache="sinks(4,1020)+int8", memory_cap_bytes=24_000_000_000)]
    for one in records:
        one["facts"]["device"] = "Intel(R) Xeon(R) Processor @ 2.10GHz with a rather long name, 2 cores"
    for name, figure in figures(records).items():
        figure.draw_without_rendering()
        for shown in (figure._suptitle, *figure.legends):
            box = shown.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width, name
            assert box.y0 >= 0 and box.y1 <= figure.bbox.height, name


def without(given, key):
    changed = copy.deepcopy(given)
    changed["results"][key] = None
    return changed


def test_capacity_is_largest_batches_and_their_ratio_to_standard():
    more = [record("lckv", 1400, largest=True, cache="int8"), record("standard", 90, largest=True, cache="int8")]
    [axes] = figures(GRID + more)["capacity-512+512"].axes
    bars = dict(zip((tick.get_text() for tick in axes.get_yticklabels()), (bar.get_width() for bar in axes.patches)))
    assert bars == {"standard, full": 100, "lckv, full": 700, "lckv, int8": 1400, "standard, int8": 90}
    assert texts(axes) == ["100  x1", "700  x7", "1,400  x14", "90  x0.9"]
    [axes] = figures(GRID)["capacity-512+512"].axes  # one cache: it is not named
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["standard", "lckv"]


def test_capacity_without_a_standard_map_has_no_ratio():
    [axes] = figures([record("lckv", 700, largest=True)])["capacity-512+512"].axes
    assert texts(axes) == ["700"]


def test_streaming_over_the_size_of_the_cache():
    sizes = (252, 508, 1020)
    cells = [record("lckv", 4, cache=f"sinks(4,{size})", scale=size / 100) for size in reversed(sizes)]
    cells += [record("lckv", 4, cache=f"sinks(4,{size})+int8", scale=size / 200) for size in sizes]
    cells += [record("lckv", 900, largest=True, cache="sinks(4,1020)"), failed(cache="sinks(4,2044)")]
    latency, memory = figures(cells)["streaming-512+512"].axes
    drawn = {bars.get_label(): bars.lines for bars in latency.containers}
    assert list(drawn) == ["lckv", "lckv, int8"]
    assert drawn["lckv"][0].get_xydata().tolist() == [[4 + n, pytest.approx(2 + 4 * n / 1e4)] for n in sizes]
    low, high = drawn["lckv"][2][0].get_segments()[0][:, 1]
    assert (low, high) == (pytest.approx(2 + 4 * 252 / 1e4 - 0.5), pytest.approx(2 + 4 * 252 / 1e4 + 0.25))
    held, peak, held_int8, _ = (one.get_ydata().tolist() for one in memory.get_lines())
    assert held == [4e4 * n for n in sizes] and held_int8 == [2e4 * n for n in sizes]
    assert peak == [3e9] * 3
    bottom, top = memory.get_ylim()
    assert bottom <= min(held_int8) and top >= 3e9


def test_streaming_where_no_peak_is_known():
    cells = [record("lckv", 4, cache=f"sinks(4,{size})", peak=None) for size in (252, 508)]
    assert len(figures(cells)["streaming-512+512"].axes[1].get_lines()) == 1


def test_lengths_caps_and_caches_have_pictures_of_their_own():
    kinds = ({}, {"new": 2048}, {"memory_cap_bytes": 24_000_000_000}, {"cache": "sinks(4,1020)+int8"})
    drawn = figures([record(batch=batch, **kind) for kind in kinds for batch in (1, 8)])
    assert [name for name in drawn if name.startswith("throughput")] == [
        "throughput-512+512", "throughput-512+512-sinks-4-1020-int8", "throughput-512+2048", "throughput-512+512-24GB",
    ]  # fmt: skip
    assert "emulated: 24 GB" in drawn["throughput-512+512-24GB"].get_suptitle()
    assert "sinks(4,1020)+int8" in drawn["throughput-512+512-sinks-4-1020-int8"].get_suptitle()
    assert "512+2,048 tokens" in drawn["throughput-512+2048"].get_suptitle()


def test_a_single_batch_is_no_curve():
    assert figures([record(), record("lckv"), failed(batch=8)]) == {}


def test_dtypes_and_devices_are_not_mixed():
    others = [record(batch=batch, dtype="float32") for batch in (1, 8)]
    for other in others:
        other["facts"]["device"] = "Xeon, 2 cores"
    drawn = figures([record(), record(batch=8), *others])
    assert {name for name in drawn if name.startswith("throughput")} == {
        "throughput-512+512-NVIDIA-H200-bfloat16", "throughput-512+512-Xeon-2-cores-float32",
    }  # fmt: skip


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        plot(GRID, tmp_path / "none")
