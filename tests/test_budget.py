"""Budgets in the decoder: against the oracle that keeps lists, and what the compiled step does."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget_oracle import budget_oracle
from test_decode_step import make_params, small

from lckv_jax.decode import loop as programs
from lckv_jax.decode import step as step_module
from lckv_jax.decode.budget import Budget
from lckv_jax.decode.cache import bytes_held, bytes_read_per_step, commit, empty, fill, observed, read
from lckv_jax.decode.cells import EMPTY
from lckv_jax.decode.sampling import Sampling, row_keys
from lckv_jax.decode.spec import BudgetSpec, CacheSpec, CellsSpec, grows, slot_specs
from lckv_jax.decode.step import decode_step, decode_weights
from lckv_jax.model.attention import attend_and_weigh, attend_cells, attention_mass, readable
from lckv_jax.model.layers import KV
from lckv_jax.model.transformer import init_params

MAPS = ["0_1_2_3", "0_2_2_3", "3_3_3_3", "0_0_2_2", "3_1_2_3", "0s_0_2s_3"]
SELECTS = ["snapkv", "pyramidkv", "h2o"]
PROMPTS, NEW = (18, 13, 4), 12  # the last is shorter than the budgets, and hardly longer than the window
COLUMNS = PROMPTS[0]


@pytest.fixture(autouse=True)
def x64():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_x64", False)


def peaked(config, seed=0):
    """Parameters with large queries, since even attention hides mistakes."""
    params = make_params(config, seed)
    params["layers"]["wq"] *= 3
    return params


def rows_of(seed, prompts=PROMPTS):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 40, prompt + NEW) for prompt in prompts]


def specs_for(config, text, columns=COLUMNS):
    return slot_specs(config, CacheSpec.parse(text), columns + NEW, prompt=columns)


def tell(params, config, specs, row, prompt, text, **options):
    spec = CacheSpec.parse(text)
    cells = {slot.owner: slot.cells if isinstance(slot, BudgetSpec) else None for slot in specs}
    return budget_oracle(params, config, row, prompt, select=spec.select, cells=cells, recent=spec.recent, **options)


def filled(specs, told, dtype=jnp.float64, poison=np.nan, columns=COLUMNS):
    """The cache after prompts as the oracle tells of them, with poison in the padding."""
    padding = [columns - row.mass[specs[0].owner].shape[1] for row in told]

    def padded(arrays, axis):
        widths = [[(p, 0) if a == axis else (0, 0) for a in range(x.ndim)] for x, p in zip(arrays, padding)]
        return jnp.asarray(np.stack([np.pad(x, w, constant_values=poison) for x, w in zip(arrays, widths)]), dtype)

    owners = [spec.owner for spec in specs]
    kvs = {owner: KV(*(padded([row.kvs[owner][i] for row in told], 0) for i in (0, 1))) for owner in owners}
    mass = {owner: padded([row.mass[owner] for row in told], 1) for owner in owners}
    return _fill(specs, kvs, jnp.asarray(padding, jnp.int32), mass)


_fill = partial(jax.jit, static_argnames="specs")(fill)


@partial(jax.jit, static_argnames=("config", "specs"))
def step(weights, config, specs, state, tokens, live):
    return decode_step(weights, config, specs, state, tokens, live)


def held(slot, row):
    return [sorted(int(at) for at in head if at != EMPTY) for head in np.asarray(slot.pos)[row]]


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("sharing", MAPS)
def test_every_map_and_select_equals_the_oracle(sharing, select):
    """Rows of unlike lengths together: logits, and the tokens that each head keeps, after every step."""
    config, text = small(sharing), f"budget(8,3,{select})"
    params, rows = peaked(config), rows_of(1)
    specs = specs_for(config, text)
    told = [tell(params, config, specs, row, prompt, text) for row, prompt in zip(rows, PROMPTS)]
    state, weights = filled(specs, told, poison=7.0), decode_weights(params, config)
    programs_before = step._cache_size()
    for t in range(NEW + 1):
        for spec in specs:
            for number, row in enumerate(told):
                if isinstance(spec, BudgetSpec):
                    assert held(state.slots[spec.owner], number) == row.kept[t][spec.owner], (t, spec, number)
        if t < NEW:
            tokens = jnp.asarray([row[prompt + t] for row, prompt in zip(rows, PROMPTS)])
            logits, state = step(weights, config, specs, state, tokens, jnp.ones(3, bool))
            want = [row.logits[t + 1] for row in told]
            np.testing.assert_allclose(logits, want, rtol=0, atol=1e-9)
    assert step._cache_size() == programs_before + 1
    assert any(len(head) < prompt for head, prompt in zip(told[0].kept[0][specs[-1].owner], PROMPTS))  # some were lost


@pytest.mark.parametrize("select", SELECTS)
def test_codes_equal_the_oracle(select):
    config, text = small("0_2_2_3"), f"budget(8,3,{select})+int8"
    params, (row, *_) = peaked(config), rows_of(2)
    specs = specs_for(config, text)
    told = tell(params, config, specs, row, COLUMNS, text, largest=127)
    state, weights = filled(specs, [told]), decode_weights(params, config)
    assert all(slot.k.dtype == jnp.int8 for slot in state.slots.values())
    for t in range(NEW):
        logits, state = step(weights, config, specs, state, jnp.asarray(row[None, COLUMNS + t]), jnp.ones(1, bool))
        np.testing.assert_allclose(logits[0], told.logits[t + 1], rtol=0, atol=1e-6)


def run(params, config, specs, rows, prompts, told, live=None, poison=np.nan):
    """Logits of all steps [NEW, B, V], and the cache at their end."""
    state, weights, out = filled(specs, told, poison=poison), decode_weights(params, config), []
    for t in range(NEW):
        live_B = jnp.asarray([True] * len(rows) if live is None else live[t])
        tokens = jnp.asarray([row[prompt + t] for row, prompt in zip(rows, prompts)])
        logits, state = step(weights, config, specs, state, tokens, live_B)
        out.append(np.asarray(logits))
    return np.stack(out), state


@pytest.mark.parametrize("select", ["pyramidkv", "h2o"])
def test_a_row_alone_is_the_row_in_a_batch(select):
    config, text = small("0_2_2_3"), f"budget(8,3,{select})"
    params, rows = peaked(config), rows_of(3)
    specs = specs_for(config, text)
    told = [tell(params, config, specs, row, prompt, text) for row, prompt in zip(rows, PROMPTS)]
    together, _ = run(params, config, specs, rows, PROMPTS, told)
    for number in (0, 1):
        alone, _ = run(params, config, specs, rows[number : number + 1], PROMPTS[number:], told[number : number + 1])
        np.testing.assert_allclose(alone[:, 0], together[:, number], rtol=0, atol=1e-12)


@pytest.mark.parametrize("select", ["snapkv", "h2o"])
def test_rows_that_have_ended_change_nothing(select):
    """Neither their own slots, to the bit, nor the other rows."""
    config, text = small("0_2_2_3"), f"budget(8,3,{select})"
    params, rows = peaked(config), rows_of(4)
    specs = specs_for(config, text)
    told = [tell(params, config, specs, row, prompt, text) for row, prompt in zip(rows, PROMPTS)]
    free, _ = run(params, config, specs, rows, PROMPTS, told)
    start = filled(specs, told)
    ended, state = run(params, config, specs, rows, PROMPTS, told, live=[[True, False, True]] * NEW)
    np.testing.assert_array_equal(ended[:, [0, 2]], free[:, [0, 2]])
    for before, after in zip(jax.tree.leaves(start.slots), jax.tree.leaves(state.slots)):
        np.testing.assert_array_equal(before[1], after[1])


@pytest.mark.parametrize("select", ["snapkv", "h2o"])
def test_what_lies_in_empty_cells_changes_nothing(select):
    config, text = small("0_0_2_2"), f"budget(8,3,{select})"
    params, rows = peaked(config), rows_of(5)
    specs = specs_for(config, text)
    told = [tell(params, config, specs, row, prompt, text) for row, prompt in zip(rows, PROMPTS)]
    state, weights = filled(specs, told), decode_weights(params, config)

    def poisoned(slot):
        there = np.asarray(slot.pos)[..., None] != EMPTY
        assert not there.all()
        return slot._replace(k=jnp.where(there, slot.k, jnp.nan), v=jnp.where(there, slot.v, 1e300))

    sick = state._replace(slots={owner: poisoned(slot) for owner, slot in state.slots.items()})
    tokens = jnp.asarray([row[prompt] for row, prompt in zip(rows, PROMPTS)])
    want, got = (step(weights, config, specs, each, tokens, jnp.ones(3, bool)) for each in (state, sick))
    np.testing.assert_array_equal(want[0], got[0])
    for owner in want[1].slots:
        np.testing.assert_array_equal(want[1].slots[owner].pos, got[1].slots[owner].pos)


def test_the_mass_is_that_of_all_queries_when_nothing_is_given_up():
    """One for each query, query head and reader; the first query of a layer that reads strictly has nothing to read.
    And such a budget is the full cache."""
    config = small("0_2_2_3")
    params, (row, *_) = peaked(config), rows_of(6)
    specs = tuple(BudgetSpec(owner, 40, 3, 1, "h2o", "raw") for owner in config.sharing.owners)
    full = specs_for(config, "full")
    told = tell(params, config, specs, row, COLUMNS, "budget(40,3,h2o)")
    got, state = run(params, config, specs, [row], [COLUMNS], [told])
    want, _ = run(params, config, full, [row], [COLUMNS], [told])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    G, queries = config.num_heads // config.num_kv_heads, COLUMNS + NEW
    for owner, total in {0: queries, 2: queries - 1 + queries, 3: queries}.items():
        np.testing.assert_allclose(state.slots[owner].score.sum(axis=2), G * total, rtol=1e-6)
        assert (np.asarray(state.slots[owner].pos) != EMPTY).sum() == config.num_kv_heads * queries


def test_the_last_tokens_are_never_given_up():
    """Not even where they are the least read; of equal scores the first cell goes."""
    spec = BudgetSpec(0, 4, 2, 1, "h2o", "raw")
    zeros = jnp.zeros((1, 1, 5, 2))
    slot = Budget(zeros, zeros, None, None, jnp.asarray([[[7, 3, 6, 2, 5]]]), jnp.asarray([[[0.0, 2, 1, 1, 3]]]))
    live, at = jnp.ones(1, bool), jnp.full(1, 7)
    after = commit(spec, slot, jnp.zeros((1, 1, 5)), at, live)
    np.testing.assert_array_equal(after.pos, [[[7, 3, 6, EMPTY, 5]]])  # 6 and 7 are the last two
    equal = slot._replace(pos=jnp.asarray([[[7, 3, 6, 5, 2]]]), score=jnp.asarray([[[0.0, 2, 0, 1, 1]]]))
    np.testing.assert_array_equal(commit(spec, equal, jnp.zeros((1, 1, 5)), at, live).pos, [[[7, 3, 6, EMPTY, 2]]])
    assert commit(spec, equal, jnp.ones((1, 1, 5)), at, live).score.tolist() == [[[1, 3, 1, 0, 2]]]


def test_readers_of_one_slot_see_the_same_tokens(monkeypatch):
    """Layers below the owner see what it sees but for the newest token; nothing is given up between two readers."""
    config, text = small("2_2_2_2"), "budget(8,3,h2o)"
    params, (row, *_) = peaked(config), rows_of(7)
    specs, seen = specs_for(config, text), []
    told = tell(params, config, specs, row, COLUMNS, text)

    def spying(config, spec, slot, *args, **options):
        seen.append(slot)
        return read(config, spec, slot, *args, **options)

    @jax.jit
    def spied(weights, state, tokens):
        seen.clear()
        return decode_step(weights, config, specs, state, tokens, jnp.ones(1, bool))[1], tuple(seen)

    monkeypatch.setattr(step_module, "read", spying)
    state, weights = filled(specs, [told]), decode_weights(params, config)
    for t in range(3):
        state, slots = spied(weights, state, jnp.asarray(row[None, COLUMNS + t]))
        first, second, owner, above = (held(slot, 0) for slot in slots)
        assert first == second == told.kept[t][2]
        assert owner == above == [[*head, COLUMNS + t] for head in first]


@pytest.mark.parametrize("select", SELECTS)
def test_a_budget_that_loses_nothing_is_the_full_cache(select):
    config = small("0_2_2_3")
    full = slot_specs(config, CacheSpec.parse("full"), 30, prompt=20)
    for text in (f"budget(600,20,{select})", f"budget(900,3,{select})"):
        assert slot_specs(config, CacheSpec.parse(text), 30, prompt=20) == full
    assert all(grows(spec) for spec in full)
    kept = slot_specs(config, CacheSpec.parse(f"budget(8,3,{select})"), 30, prompt=20)
    assert {grows(spec) for spec in kept} == {select != "h2o"}
    assert [observed(spec, 20) for spec in kept] == [20 if select == "h2o" else 3] * 3
    assert [observed(spec, 2) for spec in kept] == [2] * 3


def test_what_slots_get():
    config = small("0s_1_2_3")
    spec = CacheSpec.parse("budget(12,4,pyramidkv)")
    for prompt in (13, 17, 40):  # just above the budget, just above twice what is chosen, and far
        windowed, *pyramid = slot_specs(config, spec, 64, prompt=prompt)
        assert isinstance(windowed, CellsSpec) and windowed.ring  # the model's own window
        budgets = [slot.cells if isinstance(slot, BudgetSpec) else None for slot in pyramid]
        assert budgets == [None if prompt < 20 else 20, 12, 4]
        assert all(slot.new == 64 - prompt for slot in pyramid if isinstance(slot, BudgetSpec))
    assert {slot.cells for slot in slot_specs(small("3_3_3_3"), spec, 64, prompt=40)} == {12}
    assert slot_specs(small("0_0_2_2"), CacheSpec.parse("budget(12,4,h2o)"), 64, prompt=3)[1].cells == 12


@pytest.mark.parametrize("text", ["budget(8,3,snapkv)", "budget(8,3,pyramidkv)+int8", "budget(8,3,h2o)+int8"])
def test_bytes_by_formula_are_those_of_the_arrays(text):
    config = small("0s_2_2_3")
    specs = specs_for(config, text)
    slots = empty(config, specs, 3).slots
    assert list(slots) == [0, 2, 3]  # owners only
    assert bytes_held(config, specs, 3) == sum(x.nbytes for x in jax.tree.leaves(slots))

    def bytes_read(slot):
        return sum(x.nbytes for name, x in slot._asdict().items() if x is not None and name != "score")

    want = bytes_read(slots[0]) + 2 * bytes_read(slots[2]) + bytes_read(slots[3])
    assert bytes_read_per_step(config, specs, 3) == want


@pytest.mark.parametrize("select", ["snapkv", "h2o"])
def test_growing_adds_empty_cells(select):
    config, spec = small("0_0_2_2"), CacheSpec.parse(f"budget(8,3,{select})")
    short, long = (slot_specs(config, spec, columns, 99, prompt=COLUMNS) for columns in (20, 30))
    params, (row, *_) = peaked(config), rows_of(8)
    told = tell(params, config, short, row, COLUMNS, str(spec))
    got = programs.grow(long, filled(short, [told]))
    for name, x, y in zip(Budget._fields, got.slots[2], filled(long, [told]).slots[2]):
        if x is not None:
            np.testing.assert_array_equal(x, y, err_msg=name)


def test_a_prompt_without_mass_is_a_mistake_of_the_program():
    config = small("0_0_2_2")
    kv = KV(*[jnp.zeros((1, COLUMNS, 2, 6))] * 2)
    with pytest.raises(ValueError, match="layer 0 needs the mass"):
        fill(specs_for(config, "budget(8,3,h2o)"), {0: kv, 2: kv}, jnp.zeros(1, jnp.int32))


def test_mass_of_queries_by_hand():
    """Summed over queries and the query heads of each K/V head; queries that read nothing weigh nothing."""
    rng, (B, T, S, N, K, H) = np.random.default_rng(9), (2, 5, 7, 4, 2, 6)
    q, k, v = (rng.normal(size=(B, n, heads, H)) * 2 for n, heads in ((T, N), (S, K), (S, K)))
    q_pos, k_pos = np.tile(np.arange(T) + 2, (B, 1)), np.tile(np.arange(S), (B, 1))
    q_pos[1, :2], k_pos[1, :3] = -1, -1
    mask = np.asarray(readable(jnp.asarray(q_pos), jnp.asarray(k_pos), None, None, strict=False, window=None))
    want = np.zeros((B, K, S))
    for b, t, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(mask[b, t])
        if seen.size:
            weights = np.exp(k[b, seen, n // 2] @ q[b, t, n] / np.sqrt(H))
            want[b, n // 2, seen] += weights / weights.sum()
    arrays = jnp.asarray(q), jnp.asarray(k), jnp.asarray(mask)
    np.testing.assert_allclose(attention_mass(*arrays), want, rtol=0, atol=1e-12)
    cells = jnp.asarray(q), jnp.asarray(k).swapaxes(1, 2), jnp.asarray(v).swapaxes(1, 2), jnp.asarray(mask)[:, None]
    out, mass = attend_and_weigh(*cells)
    np.testing.assert_array_equal(out, attend_cells(*cells))
    np.testing.assert_allclose(mass, want, rtol=0, atol=1e-12)
    low = [x.astype(jnp.bfloat16) for x in arrays[:2]]
    assert attention_mass(*low, arrays[2]).dtype == jnp.float32


@pytest.mark.parametrize("select", ["snapkv", "h2o"])
def test_the_compiled_loop_copies_no_slot(select):
    """Cache aliased, no copy as large as one slot, temporaries small: steps write one cell of each head in place."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_x64", False)
    config, B = small("0_2_2_3", dtype="float32", head_dim=32), 8
    specs = slot_specs(config, CacheSpec.parse(f"budget(1024,32,{select})"), 4096, prompt=2048)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    weights = jax.eval_shape(lambda p: decode_weights(p, config), shapes)
    cache = jax.eval_shape(lambda: empty(config, specs, B))
    loop = programs.Loop(cache, jnp.zeros(B, jnp.int32), jnp.ones(B, bool), None)
    keys, stops = row_keys(Sampling(), B), jnp.zeros(0, jnp.int32)
    compiled = programs.decode.lower(weights, config, specs, None, 8, loop, keys, stops).compile()
    memory, size = compiled.memory_analysis(), sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= 0.99 * size
    assert memory.temp_size_in_bytes < 0.25 * size
    slot = min(cache.slots[owner].k.size for owner in cache.slots)
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert all(np.prod([int(n) for n in shape.split(",")]) < slot for shape in copies), copies
