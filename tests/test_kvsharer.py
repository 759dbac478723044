"""KVSharer's search: the greedy loop against plain lists, distances by hand, and trials against the model itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import run_config

from lckv_jax.convert.reshare import reshare
from lckv_jax.errors import UserError
from lckv_jax.evaluate.perplexity import score
from lckv_jax.model.layers import KV
from lckv_jax.model.transformer import forward, hidden_states, init_params
from lckv_jax.share import trials
from lckv_jax.share.distances import distance_table, position_means, ranked
from lckv_jax.share.kvsharer import Verdict, check_asked, choose, givable, map_after, search
from lckv_jax.sharing import KVSharing

LENGTHS = np.array([12, 7, 9, 12, 5])
TOKENS = np.random.default_rng(0).integers(0, 64, (5, 12))
VALID = np.arange(12)[None] < LENGTHS[:, None]


def model(sharing, num_layers=6, **changes):
    """A configuration and parameters whose projections are large enough that maps matter."""
    config = run_config(sharing=sharing, num_layers=num_layers, window=4, init_std=0.3, **changes).model
    return init_params(config, jax.random.key(1)), config


# ---------------------------------------------------------------- the greedy loop


def slow_search(d, C, threshold, cosine, descending):
    """The pseudo code with plain lists: (pairs, order tried, map)."""
    L = len(d)
    pairs = [(i, j) for i in range(L) for j in range(L) if i > j]
    pairs.sort(key=lambda p: (-d[p[0]][p[1]] if descending else d[p[0]][p[1]], p[0], p[1]))
    owner, taken, tried, kept = list(range(L)), 0, [], []
    for hi, lo in pairs:
        if taken == C:
            break
        if owner[hi] != hi:
            continue
        src = owner[lo]
        cand = [src if o == hi else o for o in owner]
        tried.append((hi, lo, src))
        if cosine(tuple(cand)) > threshold:
            owner, taken = cand, taken + 1
            kept.append((hi, lo, src))
    return kept, tried, owner


@pytest.mark.parametrize("seed", range(5))
def test_the_search_equals_a_slow_one_on_random_tables(seed):
    for case in range(100):
        rng = np.random.default_rng((seed, case))
        L = int(rng.integers(1, 11))
        C, threshold = int(rng.integers(0, L)), float(rng.uniform(-0.2, 1.1))
        values = rng.integers(0, 6, (L, L)) if case % 2 else rng.random((L, L))  # half of the tables with many ties
        order = ("dissimilar", "similar")[case // 2 % 2]

        def cosine(sources, salt=case):
            return float(np.random.default_rng((salt, *sources)).uniform(-0.5, 1.0))

        want = slow_search(values.tolist(), C, threshold, cosine, order == "dissimilar")
        table = np.where(np.tri(L, k=-1, dtype=bool), values, np.nan)

        def accept(sources, hi, cosine=cosine, threshold=threshold):
            assert sources[hi] < hi
            return Verdict(cosine(sources), cosine(sources) > threshold)

        tried = choose(table, range(L), C, accept, order=order)
        pairs = [trial for trial in tried if trial.accepted]
        found = map_after(KVSharing.parse("standard", L), pairs)
        assert [trial[:3] for trial in pairs] == want[0]
        assert [trial[:3] for trial in tried] == want[1]
        assert list(found.sources) == want[2]
        assert all(trial.distance == values[trial.hi, trial.lo] for trial in tried)


@pytest.mark.parametrize("base", ["standard", "cla(group=2)", "0_0_2_1_4_2_0_7", "0_1_1_3_1_5_6_3"])
@pytest.mark.parametrize("seed", range(10))
def test_no_chains_and_only_deeper_layers_are_given_up(base, seed):
    """Whatever the order and the verdicts: what is read is computed, nobody reads above itself, layer 0 stays."""
    base, rng = KVSharing.parse(base, 8), np.random.default_rng(seed)
    table = np.full((8, 8), np.nan)
    for i in givable(base):
        for j in base.owners:
            if j < i:
                table[i, j] = rng.random()
    seen = [base.sources]

    def accept(sources, hi):
        assert seen[-1] != sources and hi in seen[-1] and hi not in sources
        verdict = Verdict(0.0, bool(rng.integers(2)))
        if verdict.accepted:
            seen.append(sources)
        return verdict

    tried = choose(table, base.sources, 99, accept, order="random", seed=seed)
    found = map_after(base, [trial for trial in tried if trial.accepted])
    assert found.sources == seen[-1]
    assert 0 in found.owners and set(found.owners) <= set(base.owners)
    assert len(found.owners) == len(base.owners) - sum(trial.accepted for trial in tried)
    assert not any(found.upward)
    given = {trial.hi for trial in tried if trial.accepted}
    assert given.isdisjoint(found.owners)


def test_a_source_is_resolved_at_once_and_its_readers_move_too():
    """5 takes 3, then 3 takes 1: both read 1. Then 4 takes 3, which by now means 1."""
    table = np.full((6, 6), np.nan)
    table[5, 3], table[3, 1], table[4, 3] = 9, 8, 7
    tried = choose(table, range(6), 3, lambda sources, hi: Verdict(1.0, True))
    assert [trial[:3] for trial in tried] == [(5, 3, 3), (3, 1, 1), (4, 3, 1)]
    assert map_after(KVSharing.parse("standard", 6), tried).sources == (0, 1, 2, 1, 1, 1)


# ---------------------------------------------------------------- distances


def test_ranking_by_hand():
    """Layer 1 differs from 0 in one head of one token by 4; layer 2 from 0 by 1 everywhere."""
    k = np.zeros((3, 2, 2, 4))
    k[1, 0, 0] = [4, 0, 0, 0]
    k[2] = 0.5
    v = np.zeros_like(k)
    token, flat = (distance_table(k, v, metric) for metric in ("token_l2", "flat_l2"))
    assert token[1, 0] == (4 / 4) / 2 and token[2, 0] == 1 / 2  # norms 4, 0, 0, 0 and 1, 1, 1, 1
    assert flat[1, 0] == 4 / 2 and flat[2, 0] == 2 / 2  # of 16 entries of 0.5
    assert token[2, 1] == pytest.approx((np.sqrt(3.5**2 + 3 * 0.25) + 3) / 4 / 2)
    assert ranked(token, "dissimilar") == [(2, 1), (1, 0), (2, 0)]  # a tie, by (i, j)
    assert ranked(token, "similar") == [(1, 0), (2, 0), (2, 1)]
    assert ranked(flat, "dissimilar")[-1] == (2, 0) and ranked(flat, "similar")[0] == (2, 0)
    assert np.isnan(token[np.triu_indices(3)]).all()


def test_values_count_as_much_as_keys():
    k, v = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 8))
    for metric in ("token_l2", "flat_l2"):
        both = distance_table(k, v, metric)
        np.testing.assert_allclose(
            both, (distance_table(k, k, metric) + distance_table(v, v, metric)) / 2, rtol=1e-12, equal_nan=True
        )


def test_means_divide_each_position_by_its_own_count():
    k = np.random.default_rng(0).normal(size=(2, *TOKENS.shape, 2, 4)).astype(np.float32)
    found = position_means(KV(jnp.asarray(k), jnp.asarray(-k)), jnp.asarray(VALID))
    for position in range(12):
        there = [row for row in range(5) if position < LENGTHS[row]]
        want = sum(k[:, row, position].astype(np.float64) for row in there) / len(there)
        np.testing.assert_allclose(found.k_BSKH[:, position], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.v_BSKH[:, position], -want, rtol=1e-5, atol=1e-6)


def test_random_order_is_of_the_seed_alone():
    table = np.where(np.tri(6, k=-1, dtype=bool), 1.0, np.nan)
    orders = [ranked(table, "random", seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [(i, j) for i in range(6) for j in range(i)]
    assert ranked(table * 5, "random", 1) == orders[2]


# ---------------------------------------------------------------- trials


@partial(jax.jit, static_argnames=("config", "passes"))
def final_hidden(params, config, passes):
    positions = jnp.asarray(np.where(VALID, np.arange(12)[None], -1))
    return hidden_states(params, config, jnp.asarray(TOKENS), positions_BT=positions, passes=passes).x_BTD


def static_similarity(params, config, sources, passes="exact"):
    """By the model itself under each map, with its projections dropped."""

    def final(sharing):
        return np.asarray(final_hidden(*reshare(params, config, sharing, "own"), passes), np.float64)

    base, x = final(config.sharing), final(KVSharing(tuple(sources), config.sharing.windowed))
    cosines = []
    for row in range(5):
        a, b = base[row, : LENGTHS[row]].ravel(), x[row, : LENGTHS[row]].ravel()
        cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    return np.mean(cosines)


BASES = ["standard", "cla(group=2)", "yoco", "0s_1_1s_3", "0_0_1_3"]


@pytest.mark.parametrize("base", BASES)
def test_trials_equal_the_model_under_that_map(base):
    params, config = model(base, num_layers=4)
    found = search(params, config, TOKENS, len(givable(config.sharing)), threshold=-1.0, valid_BT=VALID)
    assert len(found.pairs) == len(givable(config.sharing)) and found.sharing.owners == config.sharing.owners[:1]
    for number in (0, len(found.pairs) - 1):
        sources = map_after(config.sharing, found.pairs[: number + 1]).sources
        assert found.pairs[number].cosine == pytest.approx(static_similarity(params, config, sources), abs=2e-6)
    assert {f"{trial.cosine:.3f}" for trial in found.pairs} != {"1.000"}


def test_rejected_candidates_leave_no_trace():
    """The layers below the first that differs are not computed again: they must be those of the last map kept."""
    params, config = model("standard", num_layers=4)
    found = search(params, config, TOKENS, 3, threshold=0.7, valid_BT=VALID, order="random", seed=1)
    verdicts = [trial.accepted for trial in found.tried]
    assert False in verdicts[: len(verdicts) - verdicts[::-1].index(True)]  # one is kept after one was rejected
    sources = list(range(4))
    for trial in found.tried:
        candidate = [trial.source if source == trial.hi else source for source in sources]
        assert trial.cosine == pytest.approx(static_similarity(params, config, candidate), abs=2e-6)
        assert trial.accepted == (trial.cosine > 0.7)
        sources = candidate if trial.accepted else sources


def test_the_identity_is_bit_equal():
    params, config = model("standard", scan_layers=False)
    found = search(params, config, TOKENS, 0)
    assert found.sharing == config.sharing and found.tried == () and found.pairs == ()
    same, new = reshare(params, config, found.sharing, "own")
    logits = [forward(p, c, jnp.asarray(TOKENS)) for p, c in ((params, config), (same, new))]
    np.testing.assert_array_equal(*logits)
    sentences = trials.Sentences(jnp.asarray(TOKENS), jnp.broadcast_to(jnp.arange(12), TOKENS.shape))
    assert trials.make_trials(params, config, sentences, "trained").similarity(config.sharing.sources, 0) == 1.0


def test_distances_are_those_of_the_models_own_keys_and_values():
    params, config = model("cla(group=2)")
    positions = jnp.asarray(np.where(VALID, np.arange(12)[None], -1))
    slots = hidden_states(params, config, jnp.asarray(TOKENS), positions_BT=positions).slots
    k, v = (
        np.stack([np.asarray(slots[owner][n], np.float64) for owner in (0, 2, 4)]) for n in range(2)
    )  # [C, B, T, K, H]
    means = [(x * VALID[None, :, :, None, None]).sum(1) / VALID.sum(0)[None, :, None, None] for x in (k, v)]
    for metric in ("token_l2", "flat_l2"):
        found = search(params, config, TOKENS, 0, metric=metric, valid_BT=VALID).distances
        want = distance_table(*means, metric)
        np.testing.assert_allclose(found[np.ix_((0, 2, 4), (0, 2, 4))], want, rtol=1e-5)
        assert np.isnan(found[[1, 3, 5]]).all() and np.isnan(found[:, [1, 3, 5]]).all()


def test_padding_changes_nothing():
    params, config = model("standard")
    short = search(params, config, TOKENS, 3, valid_BT=VALID, threshold=-1.0)
    padded = np.full((5, 128), 63)
    padded[:, :12] = TOKENS
    valid = np.zeros((5, 128), bool)
    valid[:, :12] = VALID
    assert search(params, config, padded, 3, valid_BT=valid, threshold=-1.0).pairs == short.pairs
    left = [np.roll(x, 128 - 12, axis=1) for x in (padded, valid)]
    assert search(params, config, left[0], 3, valid_BT=left[1], threshold=-1.0).pairs == short.pairs
    one = search(params, config, TOKENS[1:2, :7], 1, threshold=-1.0)
    assert search(params, config, TOKENS[1:2], 1, valid_BT=VALID[1:2], threshold=-1.0).pairs == one.pairs


def test_threshold_extremes():
    params, config = model("standard")
    params["layers"]["wo"] *= 0  # attention does nothing: every map gives the very same hidden states
    none = search(params, config, TOKENS, 3, threshold=1.0)
    assert none.pairs == () and none.sharing == config.sharing and len(none.tried) == 15
    assert all(trial.cosine == pytest.approx(1.0, abs=1e-6) for trial in none.tried)
    params, config = model("standard")
    every = search(params, config, TOKENS, 3, threshold=-1.0)
    first, given = [], set()
    for hi, lo in ranked(every.distances, "dissimilar"):
        if hi not in given and len(given) < 3:
            given.add(hi)
            first.append((hi, lo))
    assert [trial[:2] for trial in every.pairs] == first and len(every.tried) == 3


def test_one_compile_for_the_whole_search():
    params, config = model("standard", num_layers=9, hidden_size=12)
    before = trials.sweep_layers._cache_size()
    found = search(params, config, TOKENS, 6, threshold=0.9, valid_BT=VALID)
    assert len(found.tried) > 6
    search(params, config, TOKENS, 3, order="similar", threshold=-1.0, valid_BT=VALID)
    assert trials.sweep_layers._cache_size() == before + 1


def test_bfloat16():
    params, config = model("standard", num_layers=4, dtype="bfloat16")
    found = search(params, config, TOKENS, 2, threshold=-1.0)
    assert len(found.pairs) == 2 and all(np.isfinite(trial.cosine) for trial in found.pairs)


# ---------------------------------------------------------------- cyclic maps


def test_cyclic_maps():
    """0_2_2_3: layer 1 reads 2 from below, so only 3 can be given up; trials run the passes of the training."""
    params, config = model("0_2_2_3", num_layers=4)
    assert givable(config.sharing) == (3,)
    found = search(params, config, TOKENS, 1, threshold=-1.0, valid_BT=VALID)
    assert found.sharing.owners == (0, 2) and found.sharing.upward == config.sharing.upward
    want = static_similarity(params, config, found.sharing.sources, "trained")
    assert found.pairs[-1].cosine == pytest.approx(want, abs=2e-6)


def test_a_readers_span_may_hold_an_owner_that_is_given_up():
    """In 0_3_2_3 the span is 1 to 3; 2 lies in it and can be given up all the same."""
    params, config = model("0_3_2_3", num_layers=4)
    assert givable(config.sharing) == (2,)
    found = search(params, config, TOKENS, 1, threshold=-1.0, valid_BT=VALID, passes="exact")
    assert str(found.sharing) == "0_3_0_3"
    assert found.pairs[-1].cosine == pytest.approx(static_similarity(params, config, found.sharing.sources), abs=2e-6)


def test_what_cannot_be_given_up_is_named():
    lckv = KVSharing.parse("0_6_6_6_6_6_6_7", 8)
    check_asked(lckv, 1)
    with pytest.raises(UserError) as caught:
        check_asked(lckv, 2)
    assert str(caught.value) == (
        "share: 2 layers of the map 0_6_6_6_6_6_6_7 cannot be given up: layer 0 is the lowest that has K,V; layer 6 is "
        "read from below by layers 1, 2, 3, 4, 5; only 7 can be given up, so ask for at most 1"
    )
    with pytest.raises(UserError, match="no layer can be given up"):
        check_asked(KVSharing.parse("3_3_3_3", 4), 1)
    with pytest.raises(UserError, match="only 1, 2, 3 can be given up, so ask for at most 3"):
        check_asked(KVSharing.parse("standard", 4), 4)
    with pytest.raises(UserError, match="-1 layers"):
        check_asked(lckv, -1)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("map", ["0_0_2_3", "0_1_1_3", "0_1_2_1"])
def test_decoding_with_the_map_is_the_full_forward_with_it(map):
    """Low, middle and top layers shared: no token's history may be lost."""
    params, config = reshare(*model("standard", num_layers=4), map, "own")
    assert params["kv"]["wk"].shape[0] == len(set(map.split("_")))
    lists = [row[:length].tolist() for row, length in zip(TOKENS, LENGTHS)]
    for decoded, forward_ in zip(score(params, config, lists, cache="full"), score(params, config, lists)):
        np.testing.assert_allclose(decoded, forward_, atol=3e-5)


# ---------------------------------------------------------------- bad input


def test_bad_input_is_told():
    params, config = model("standard")
    for message, changes in {
        "there is no order 'disimilar'; did you mean dissimilar?": {"order": "disimilar"},
        "there is no metric 'token_l1'; did you mean token_l2?": {"metric": "token_l1"},
        "a calibration sentence has no token": {"valid_BT": np.zeros_like(VALID)},
        "valid_BT has shape": {"valid_BT": VALID[:2]},
        "unknown name 'exactly'": {"passes": "exactly"},
    }.items():
        with pytest.raises(UserError) as caught:
            search(params, config, TOKENS, 1, **changes)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="has token 64, but ids are below 64"):
        search(params, config, np.where(TOKENS.max() == TOKENS, 64, TOKENS), 1)
    with pytest.raises(UserError, match="are integers"):
        search(params, config, TOKENS / 2, 1)


@pytest.mark.parametrize("base", ["standard", "0_2_2_3"])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_model_that_diverged_is_refused(base, layer):
    """Layer 3 is the last, whose output no keys and values show."""
    params, config = model(base, num_layers=4)
    params["layers"]["wo"] = params["layers"]["wo"].at[layer].set(np.nan)
    with pytest.raises(UserError, match="not finite"):
        search(params, config, TOKENS, 1, valid_BT=VALID)
