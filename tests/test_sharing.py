"""KVSharing: the official plans, every way to write a map, properties of random maps, FLOPs, and every mistake."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv_jax import KVSharing
from lckv_jax.errors import UserError

parse = KVSharing.parse
quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@st.composite
def maps(draw, max_layers=14):
    """Maps whose layers read themselves, or near or far, up or down, with and without windows."""
    num_layers = draw(st.integers(1, max_layers))
    reach = draw(st.integers(1, num_layers))
    sources = [
        draw(st.just(layer) | st.integers(max(0, layer - reach), min(num_layers - 1, layer + reach)))
        for layer in range(num_layers)
    ]
    windowed = draw(st.lists(st.booleans(), min_size=num_layers, max_size=num_layers))
    return KVSharing(tuple(sources), tuple(windowed))


# ---------------------------------------------------------------- the official plans


def plan(sharing, m, b):
    """The spans as rows of the official plan: first, end, with gradient, hands its output on, how often."""
    rows = []
    for start, stop, cyclic in sharing.spans():
        rows += [[start, stop, False, False, m]] if cyclic and m else []
        rows += [[start, stop, True, False, b - 1]] if cyclic and b > 1 else []
        rows += [[start, stop, True, True, 1]]
    return rows


def test_official_plans(golden):
    plans = json.loads((golden / "iteration_plans.json").read_text())
    assert len(plans) == 34
    for want in plans:
        text = want["layer_types"]
        sharing = parse(text, text.count("_") + 1)
        assert str(sharing) == text
        assert plan(sharing, want["forward_passes"], want["backward_passes"]) == want["plan"], text
        assert list(sharing.owners) == want["kv_layers"], text
        assert [i for i, upward in enumerate(sharing.upward) if upward] == want["strict_layers"], text
        assert [i for i, windowed in enumerate(sharing.windowed) if windowed] == want["window_layers"], text
        assert sharing.cyclic == bool(want["strict_layers"]), text


# ---------------------------------------------------------------- every way to write a map

LCKV_22 = "0_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_21"
MIDDLE_22 = "0_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_21"


@pytest.mark.parametrize(
    ("spec", "num_layers", "want"),
    [
        ("0_6_6_6_6_6_6_7", 8, "0_6_6_6_6_6_6_7"),
        (" 0s_0_2 ", 3, "0s_0_2"),
        ("0_0s_2", 3, "0_0s_2"),
        ("3_3_3_0", 4, "3_3_3_0"),  # an entry is taken at its word: layer 3 computes K,V and reads those of layer 0
        ([0, 2, 2], 3, "0_2_2"),
        ((0, 0), 2, "0_0"),
        (["0s", 0, "2s"], 3, "0s_0_2s"),
        ("0 20*20 21", 22, LCKV_22),
        ("0s*2\n 2*1 3s", 4, "0s_0s_2_3s"),
        ("0*3", 3, "0_0_0"),
        (KVSharing((1, 1), (False, True)), 2, "1_1s"),
        ("standard", 4, "0_1_2_3"),
        ("lckv", 8, "0_6_6_6_6_6_6_7"),
        ("lckv(warmup=2)", 22, LCKV_22),
        ("LCKV (10)", 22, "0_1_2_3_4_16_16_16_16_16_16_16_16_16_16_16_16_17_18_19_20_21"),
        ("lckv(warmup=0)", 8, "7_7_7_7_7_7_7_7"),
        ("lckv(warmup=4)", 8, "0_1_5_5_5_5_6_7"),
        ("cla", 8, "0_0_2_2_4_4_6_6"),
        ("cla(group=2)", 22, "0_0_2_2_4_4_6_6_8_8_10_10_12_12_14_14_16_16_18_18_20_20"),
        ("cla(group=3)", 7, "0_0_0_3_3_3_6"),
        ("yoco", 22, "0s_1s_2s_3s_4s_5s_6s_7s_8s_9s_10s_11_11_11_11_11_11_11_11_11_11_11"),
        ("yoco", 7, "0s_1s_2s_3_3_3_3"),
        ("mlkv(kv_layers=2)", 6, "0_0_0_3_3_3"),
        ("mlkv(3)", 7, "0_0_0_3_3_5_5"),
        ("trailing(shared=3)", 8, "0_1_2_3_4_4_4_4"),
        ("trailing(shared=0)", 3, "0_1_2"),
        ("grid(sandwich, top, 3)", 22, LCKV_22),
        ("grid(partition=sandwich, target=middle, kv_layers=3)", 22, MIDDLE_22),
        ("grid(lasagna, bottom, 11)", 22, "0_0_2_2_4_4_6_6_8_8_10_10_12_12_14_14_16_16_18_18_20_20"),
        ("grid(pizza, bottom, 12)", 22, "0_1_2_3_4_5_6_7_8_9_10_11_11_11_11_11_11_11_11_11_11_11"),
        # an even and an uneven split, all nine
        ("grid(pizza,bottom,4)", 8, "0_1_2_3_3_3_3_3"),
        ("grid(pizza,middle,4)", 8, "0_1_2_5_5_5_5_5"),
        ("grid(pizza,top,4)", 8, "0_1_2_7_7_7_7_7"),
        ("grid(sandwich,bottom,4)", 8, "0_1_2_2_2_2_2_7"),
        ("grid(sandwich,middle,4)", 8, "0_1_4_4_4_4_4_7"),
        ("grid(sandwich,top,4)", 8, "0_1_6_6_6_6_6_7"),
        ("grid(lasagna,bottom,4)", 8, "0_0_2_2_4_4_6_6"),
        ("grid(lasagna,middle,4)", 8, "0_2_2_2_4_4_6_6"),
        ("grid(lasagna,top,4)", 8, "0_3_3_3_5_5_7_7"),
        ("grid(pizza,bottom,3)", 10, "0_1_2_2_2_2_2_2_2_2"),
        ("grid(pizza,middle,3)", 10, "0_1_5_5_5_5_5_5_5_5"),
        ("grid(pizza,top,3)", 10, "0_1_9_9_9_9_9_9_9_9"),
        ("grid(sandwich,bottom,3)", 10, "0_1_1_1_1_1_1_1_1_9"),
        ("grid(sandwich,middle,3)", 10, "0_4_4_4_4_4_4_4_4_9"),
        ("grid(sandwich,top,3)", 10, "0_8_8_8_8_8_8_8_8_9"),
        ("grid(lasagna,bottom,3)", 10, "0_0_0_0_4_4_4_7_7_7"),
        ("grid(lasagna,middle,3)", 10, "0_3_3_3_3_3_7_7_7_7"),
        ("grid(lasagna,top,3)", 10, "0_5_5_5_5_5_9_9_9_9"),
    ],
)
def test_specs(spec, num_layers, want):
    assert str(parse(spec, num_layers)) == want


@pytest.mark.parametrize("partition", ["pizza", "sandwich", "lasagna"])
@pytest.mark.parametrize("target", ["bottom", "middle", "top"])
def test_grid_has_its_owners_and_layer_0_owns_itself(partition, target):
    for num_layers in range(1, 15):
        for kv_layers in range(1, num_layers + 1):
            if kv_layers == 1 and num_layers > 1 and target != "bottom":
                continue  # refused, see test_mistakes
            sharing = parse(f"grid({partition}, {target}, {kv_layers})", num_layers)
            assert len(sharing.owners) == kv_layers
            assert sharing.sources[0] == 0
            assert list(sharing.sources) == sorted(sharing.sources)  # groups are consecutive
            assert all(sharing.sources[owner] == owner for owner in sharing.owners)
            assert sharing.cyclic or target != "top" or kv_layers == num_layers
            assert not sharing.cyclic or target != "bottom"


# ---------------------------------------------------------------- properties


@quick
@given(maps())
def test_text_round_trip(sharing):
    assert parse(str(sharing), sharing.num_layers) == sharing
    assert parse(str(sharing).split("_"), sharing.num_layers) == sharing
    assert parse(sharing, sharing.num_layers) == sharing
    assert hash(parse(str(sharing), sharing.num_layers)) == hash(sharing)


@quick
@given(maps())
def test_spans_are_the_smallest_closed_partition(sharing):
    spans = sharing.spans()
    assert [layer for span in spans for layer in range(span.start, span.stop)] == list(range(sharing.num_layers))
    for span in spans:
        reads = sharing.sources[span.start : span.stop]
        assert span.cyclic == any(sharing.upward[span.start : span.stop])
        if span.cyclic:
            assert sharing.upward[span.start]
            assert max(reads) == span.stop - 1  # nothing above the end is read, and the end is read
            for stop in range(span.start + 1, span.stop):  # any shorter one is left by some reader
                assert max(sharing.sources[span.start : stop]) >= stop
    for below, above in pairwise(spans):
        assert below.cyclic or above.cyclic  # spans that run once are not cut


@quick
@given(maps())
def test_runs_partition_the_span_by_one_rule(sharing):
    for span in sharing.spans():
        runs = sharing.runs(span)
        assert [i for run in runs for i in range(run.start, run.stop)] == list(range(span.start, span.stop))
        for run in runs:
            layers = range(run.start, run.stop)
            assert {sharing.upward[i] for i in layers} == {run.upward}
            assert {sharing.windowed[i] for i in layers} == {run.windowed}
            assert {i in sharing.owners for i in layers} == {run.owners}
            for i in layers:
                assert sharing.sources[i] == (i if run.source is None else run.source)
            if len(layers) > 1 and run.owners:  # each reads only its own and nobody else reads it
                assert all(sharing.sources.count(i) == 1 and sharing.sources[i] == i for i in layers)
        if span.cyclic:
            assert runs[-1].start == span.stop - 1 and runs[-1].owners
        for a, b in pairwise(runs):  # and none is cut without need
            private = all(sharing.sources.count(i) == 1 and sharing.sources[i] == i for i in (a.start, b.start))
            same = (not a.owners and a.source is not None) or (private and not (span.cyclic and b is runs[-1]))
            assert a[2:] != b[2:] or not same


@quick
@given(maps())
def test_slots_donors_and_upward_sources(sharing):
    assert sharing.owners == tuple(i for i in range(sharing.num_layers) if i in sharing.sources)
    assert all(sharing.owners[slot] == source for slot, source in zip(sharing.slot_of, sharing.sources))
    donors = [sharing.donors(slot) for slot in range(len(sharing.owners))]
    assert sorted(layer for some in donors for layer in some) == list(range(sharing.num_layers))
    assert all(sharing.slot_of[layer] == slot for slot, some in enumerate(donors) for layer in some)
    for span in sharing.spans():
        upward = {s for i, s in enumerate(sharing.sources) if s > i and span.start <= i < span.stop}
        assert sharing.upward_sources(span) == tuple(sorted(upward))


def test_cache_bytes():
    """2405.10637's models in bf16: 22,528 and 3,072 bytes a token (1.1B); 524,288, 180,224 and 49,152 (7B)."""
    assert parse("standard", 22).cache_bytes_per_token(4, 64) == 22_528
    assert parse("lckv(warmup=2)", 22).cache_bytes_per_token(4, 64) == 3_072
    assert parse("lckv(warmup=10)", 32).cache_bytes_per_token(32, 128) == 180_224
    assert parse("lckv(warmup=2)", 32).cache_bytes_per_token(32, 128, 2) == 49_152
    assert parse("3_3_3_0", 4).cache_bytes_per_token(2, 8, 4) == 2 * 2 * 2 * 8 * 4


@quick
@given(maps())
def test_diagram_shows_every_layer(sharing):
    lines = sharing.diagram().split("\n")
    assert [int(line.split()[0]) for line in lines] == list(reversed(range(sharing.num_layers)))
    spans = {span.stop - 1: f" {span.start}-{span.stop - 1}: m + b passes" for span in sharing.spans() if span.cyclic}
    for line in lines:
        layer = int(line.split()[0])
        assert ("[K,V]" in line) == (layer in sharing.owners)
        assert (f"reads {sharing.sources[layer]}" in line) != (sharing.sources[layer] == layer)
        assert ("^ (strictly earlier tokens)" in line) == sharing.upward[layer]
        assert ("sliding window" in line) == sharing.windowed[layer]
        assert ("passes" in line) == (layer in spans) and line.endswith(spans.get(layer, ""))


# ---------------------------------------------------------------- FLOPs


def counted(sharing, D, F, N, K, H, V, T, window, m, b, start):
    """FLOPs (forward, train) a token, added up over layers, passes, queries and keys by the semantics of the model."""
    forward = train = 0

    def spend(multiply_adds, *, trained):
        nonlocal forward, train
        forward += 2 * multiply_adds
        train += 2 * multiply_adds * (3 if trained else 1)

    for span in sharing.spans():
        layers = range(span.start, span.stop)
        passes = m + b if span.cyclic else 1
        if span.cyclic and start == "input":  # the first K,V are projected from the span's input, without gradient
            for _ in {sharing.sources[i] for i in layers if sharing.upward[i]}:
                spend(T * 2 * D * K * H, trained=False)
        for number in range(passes):
            how = {"trained": not span.cyclic or number >= m}
            for i in layers:
                if i in sharing.owners:
                    spend(T * 2 * D * K * H, **how)
                if i == span.stop - 1 and number < passes - 1:
                    continue  # the highest owner: K,V only
                spend(T * 3 * D * F, **how)
                if sharing.upward[i] and number == 0 and start == "zero":
                    continue  # nothing to read yet
                spend(T * 2 * D * N * H, **how)
                for t in range(T):
                    keys = [s for s in range(T) if (s < t if sharing.upward[i] else s <= t)]
                    keys = [s for s in keys if not sharing.windowed[i] or s > t - window]
                    spend(2 * N * H * len(keys), **how)
    spend(T * D * V, trained=True)
    return forward / T, train / T


@pytest.mark.parametrize(
    "text",
    ["0_1_2_3_4", "0_3_3_3_4", "4_4_4_4_4", "0_2_2_2_2", "0_0_2_2_4", "0s_1s_2_2_2", "2s_2s_2_4_4s", "1_2s_0_4_4"],
)
@pytest.mark.parametrize(("m", "b"), [(7, 2), (0, 1), (0, 3), (2, 1)])
@pytest.mark.parametrize("start", ["zero", "input"])
def test_flops_against_counting(text, m, b, start):
    sizes = {"D": 6, "F": 10, "N": 4, "K": 2, "H": 3, "V": 11, "T": 9, "window": 4}
    got = flops(parse(text, 5), **sizes, m=m, b=b, start=start)
    assert got == pytest.approx(counted(parse(text, 5), **sizes, m=m, b=b, start=start))


@pytest.mark.parametrize("window", [1, 9, 50])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_flops_at_the_edges_of_window_and_length(window, T):
    sizes = {"D": 2, "F": 2, "N": 2, "K": 1, "H": 4, "V": 3, "T": T, "window": window, "m": 1, "b": 2, "start": "zero"}
    sharing = parse("2s_1s_2_2s", 4)
    assert flops(sharing, **sizes) == pytest.approx(counted(sharing, **sizes))


def flops(sharing, *, D, F, N, K, H, V, T, window=None, m=7, b=2, start="zero"):
    return sharing.flops(
        hidden_size=D, intermediate_size=F, num_heads=N, num_kv_heads=K, head_dim=H, vocab_size=V, seq_len=T,
        window=window, no_grad_passes=m, grad_passes=b, start=start,
    )  # fmt: skip


TINYLLAMA = {"D": 2048, "F": 5632, "N": 32, "K": 4, "H": 64, "V": 32000, "T": 2048}
LLAMA_7B = {"D": 4096, "F": 11008, "N": 32, "K": 32, "H": 128, "V": 32000, "T": 2048}
SMALL = {"D": 768, "F": 2048, "N": 12, "K": 6, "H": 64, "V": 32000, "T": 1024}
TINY = {"D": 512, "F": 1024, "N": 8, "K": 4, "H": 64, "V": 32000, "T": 1024}


@pytest.mark.parametrize(
    ("sizes", "num_layers", "spec", "zero_start", "input_start"),
    [
        (TINYLLAMA, 22, "lckv(warmup=2)", 3.55, [1.78, 2.04, 2.30, 2.57, 2.83]),
        (TINYLLAMA, 22, "lckv(warmup=10)", 2.47, [1.45, 1.60, 1.75, 1.90, 2.06]),
        (TINYLLAMA, 22, "0 11*20 21", 2.33, [1.40, 1.53, 1.67, 1.81, 1.95]),
        (LLAMA_7B, 32, "lckv(warmup=2)", 3.30, [1.61, 1.86, 2.11, 2.36, 2.61]),
        (SMALL, 12, "lckv(warmup=2)", 2.69, [1.49, 1.67, 1.85, 2.03, 2.21]),
        (TINY, 8, "lckv(warmup=2)", 2.03, [1.30, 1.41, 1.52, 1.63, 1.74]),
    ],
)
def test_flops_of_known_models(sizes, num_layers, spec, zero_start, input_start):
    """Training FLOPs over those of the standard model: with 7 + 2 passes, and from the input with m = 0..4."""
    sharing, standard = parse(spec, num_layers), flops(parse("standard", num_layers), **sizes)
    assert flops(sharing, **sizes).train / standard.train == pytest.approx(zero_start, rel=0.015)
    for m, want in enumerate(input_start):
        assert flops(sharing, **sizes, m=m, start="input").train / standard.train == pytest.approx(want, rel=0.015)


def test_strict_everywhere_reads_one_key_less():
    sizes = dict(hidden_size=8, intermediate_size=8, num_heads=3, num_kv_heads=1, head_dim=5, vocab_size=7, seq_len=10)
    usual, strict = (parse("cla", 4).flops(**sizes, strict_everywhere=strict) for strict in (False, True))
    assert usual.forward - strict.forward == 4 * 4 * 3 * 5  # layers, FLOPs a key and head dimension, heads, head size


def test_flops_of_a_standard_token():
    """6.76 GFLOP a token of TinyLlama and 41.3 of a 7B model, forward and backward, at length 2048."""
    assert flops(parse("standard", 22), **TINYLLAMA).train == pytest.approx(6.76e9, rel=0.01)
    assert flops(parse("standard", 32), **LLAMA_7B).train == pytest.approx(41.3e9, rel=0.02)


# ---------------------------------------------------------------- mistakes

QUOTE = 'YAML.*quote it, as in sharing: "0_6_6_6_6_6_6_7"'


@pytest.mark.parametrize(
    ("spec", "num_layers", "message"),
    [
        (6666667, 8, f"number 6666667.*{QUOTE}"),
        (0.5, 8, QUOTE),
        ("0_1", 3, "2 entries .0_1. .* 3 layers: layer 2 has no entry; give one entry a layer or change num_layers"),
        ("0_1_2_2", 3, "4 entries .* 3 layers: layer 3 does not exist; give one entry a layer"),
        ("0 1*3", 3, "4 entries .* 3 layers"),
        (KVSharing((0, 0), (False, False)), 3, "layer 2 has no entry"),
        ([0, 1], 3, "layer 2 has no entry"),
        ([], 1, "layer 0 has no entry"),
        ("_".join(["0"] * 99), 3, r"99 entries .*\.\.\..* 3 layers"),
        ("0_3_2", 3, "layer 1 reads layer 3, which does not exist; use 0 to 2"),
        ([0, 1, 9], 3, "layer 2 reads layer 9, which does not exist; use 0 to 2"),
        ("0_1w_2", 3, "layer 1: '1w' is not a layer number .* write, for example, 6 or 6s"),
        ("0__2", 3, "layer 1: '' is not a layer number"),
        ("0_-1_2", 3, "layer 1: '-1' is not a layer number"),
        ([0, -1], 2, "layer 1: '-1' is not a layer number"),
        ("0 1*x 2", 3, r"layer 1: '1\*x' is not SOURCE or SOURCE\*COUNT; write, for example, 0 20\*20 21"),
        ("0 1*2 s", 4, "layer 3: 's' is not SOURCE"),
        ([0, True], 2, "layer 1: expected a layer number such as 6 or '6s', got True"),
        ([0, None], 2, "layer 1: expected a layer number .* got None"),
        ([1.0], 1, "layer 0: expected a layer number .* got 1.0"),
        (None, 2, "expected a map as text or a list, got NoneType"),
        ({"map": "0_1"}, 2, "expected a map as text or a list, got dict"),
        ("", 2, "the map is empty; give one entry a layer, or a family"),
        ("  ", 2, "the map is empty"),
        ("0_1", 0, "num_layers is 0; a model has at least 1 layer"),
        ("lckvv", 8, "'lckvv' is neither a map .* nor a known family; did you mean lckv"),
        ("sandwhich", 8, "known families: standard, lckv, cla, yoco, mlkv, trailing, grid"),
        ("lckv(warmup=2", 8, "is neither a map"),
        ("lckv(warmup=3)", 8, "warmup=3.*half of the warm-up layers go to each end; give an even number"),
        ("lckv(warmup=8)", 8, "warmup=8.*8 layers has room for 0 to 6"),
        ("lckv(warmup=-2)", 8, "warmup=-2.*room for 0 to 6"),
        ("lckv(warmup=two)", 8, "warmup='two' is not a number"),
        ("lckv(groups=2)", 8, "lckv has no argument 'groups'; it takes warmup"),
        ("lckv(2, warmup=2)", 8, r"cannot read .* write lckv\(warmup=...\)"),
        ("lckv(warmup=2, warmup=4)", 8, "warmup"),
        ("yoco(2)", 8, r"cannot read 'yoco\(2\)'; write yoco\(\)"),
        ("yoco", 1, "needs at least 2 layers"),
        ("mlkv", 8, r"cannot read 'mlkv'; write mlkv\(kv_layers=...\)"),
        ("mlkv(9)", 8, "kv_layers=9 of 8 layers; give 1 to 8"),
        ("cla(group=0)", 8, "group=0.*give 1 to 8"),
        ("cla(group=9)", 8, "group=9.*give 1 to 8"),
        ("trailing(shared=8)", 8, "shared=8.*give 0 to 7 of 8 layers"),
        ("trailing(shared=-1)", 8, "shared=-1.*give 0 to 7"),
        ("grid(pizza, top)", 8, r"cannot read .* write grid\(partition=..., target=..., kv_layers=...\)"),
        ("grid(round, top, 3)", 8, "partition is pizza, sandwich or lasagna, not 'round'"),
        ("grid(pizza, upper, 3)", 8, "target is bottom, middle or top, not 'upper'"),
        ("grid(pizza, 3, 3)", 8, "target=3 is not a word"),
        ("grid(3, top, 3)", 8, "partition=3 is not a word"),
        ("grid(pizza, top, x)", 8, "kv_layers='x' is not a number"),
        ("grid(pizza, top, 0)", 8, "kv_layers=0 of 8 layers; give 1 to 8"),
        ("grid(lasagna, bottom, 9)", 8, "kv_layers=9 of 8 layers; give 1 to 8"),
        ("grid(pizza, top, 1)", 8, "kv_layers=1 and target=top layer 0 would not own .* give at least 2"),
        ("0 1*0 1*2", 3, r"layer 1: '1\*0' is not SOURCE or SOURCE\*COUNT"),
        ("grid(lasagna, middle, 1)", 8, "kv_layers=1 and target=middle"),
    ],
)
def test_mistakes(spec, num_layers, message):
    with pytest.raises(UserError) as caught:
        parse(spec, num_layers)
    assert re.search(f"^sharing: .*{message}", str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sources", "windowed", "message"),
    [((), (), "empty"), ((0,), (), "1 sources but 0 window marks"), ((0, -1), (False, True), "layer 1 reads layer -1")],
)
def test_wrong_values(sources, windowed, message):
    with pytest.raises(UserError, match=message):
        KVSharing(sources, windowed)
