"""What a cache keeps and how: one text such as `sinks(4,1020)+int8`, and what it means for each slot of a model."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from lckv_jax.config import ModelConfig
from lckv_jax.decode.select import pyramid
from lckv_jax.errors import UserError

_POLICIES: dict[str, tuple[str, ...]] = {
    "full": (),
    "window": ("window",),
    "sinks": ("sinks", "window"),
    "budget": ("cells", "recent", "select"),
}
_CODECS: dict[str, tuple[str, ...]] = {
    "raw": (),
    "int8": (),
    "int4": (),
    "kivi": ("bits", "group", "residual"),
}
_EXAMPLES = {
    "window": "window(256)",
    "sinks": "sinks(4,1020)",
    "budget": "budget(512,32,snapkv)",
    "kivi": "kivi(2,32,128)",
}
_SELECTS = ("snapkv", "pyramidkv", "h2o")


@dataclass(frozen=True)
class CacheSpec:
    """Which tokens are kept (policy) and as what (codec).

    policy: `full`; `window` = the last `window` tokens, the current one included; `sinks` = those and the first `sinks`
    tokens (StreamingLLM, 2309.17453: positions are those in the cache, so that a stream may be endless); `budget` =
    `cells` tokens for each head, the last `recent` among them, by `select`: `snapkv` (2404.14469) and `pyramidkv`
    (2406.02069: more in lower slots) choose once when the prompt ends and keep what is new, `h2o` (2306.14048) gives
    up the least read token with every new one.
    codec: `raw` = the compute dtype; `int8`, `int4` = symmetric, one scale for each token and head; `kivi` (2402.02750)
    = `bits` each, keys in groups of `group` tokens of a channel, values in groups of `group` channels of a token, and
    the last tokens, up to `residual`, as they are.
    """

    policy: str = "full"
    sinks: int = 0
    window: int = 0
    cells: int = 0
    recent: int = 0
    select: str = ""
    codec: str = "raw"
    bits: int = 0
    group: int = 0
    residual: int = 0

    @classmethod
    def parse(cls, spec: CacheSpec | str) -> CacheSpec:
        """The cache that a text means: POLICY, POLICY(sizes), CODEC or POLICY+CODEC. Raises UserError."""
        if isinstance(spec, CacheSpec):
            return spec
        parts = [part.strip() for part in spec.split("+")]
        if len(parts) > 2 or not all(parts):
            raise UserError(f"cache: {spec!r} is not POLICY+CODEC; write, for example, sinks(4,1020)+int8")
        if len(parts) == 1:
            parts = ["full", *parts] if parts[0].partition("(")[0].strip() in _CODECS else [*parts, "raw"]
        policy, sizes = _call(spec, parts[0], "policy", _POLICIES)
        codec, settings = _call(spec, parts[1], "codec", _CODECS)
        return _checked(cls(policy, codec=codec, **sizes, **settings))

    def __str__(self) -> str:
        """The text that `parse` reads."""
        texts = []
        for name, fields in ((self.policy, _POLICIES[self.policy]), (self.codec, _CODECS[self.codec])):
            texts.append(name + (f"({','.join(str(getattr(self, field)) for field in fields)})" if fields else ""))
        return texts[0] if self.codec == "raw" else "+".join(texts)


def cache_texts(value: Any) -> tuple[str, ...]:
    """The texts of caches in a setting, each once: one or a list, also where YAML has split the list at the commas
    inside their parentheses. Raises UserError."""
    joined = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    texts = re.split(r",(?![^(]*\))", joined)
    return tuple(dict.fromkeys(str(CacheSpec.parse(text)) for text in texts))


def _call(spec: str, text: str, kind: str, known: dict[str, tuple[str, ...]]) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a text such as sinks(4,1020)."""
    match = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", text)
    if not match or match[1] not in known:
        raise UserError(f"cache: there is no {kind} {text!r}; {_near(text, known)}")
    name, names = match[1], known[match[1]]
    values = [value.strip() for value in match[2].split(",")] if match[2] and match[2].strip() else []
    pattern = {"select": rf"{'|'.join(_SELECTS)}"}
    if len(values) != len(names) or not all(
        re.fullmatch(pattern.get(field, r"[1-9]\d*"), value) for field, value in zip(names, values)
    ):
        if not names:
            raise UserError(f"cache: {spec!r} cannot be read; {name} has no numbers, write {name}")
        words = f" and {', '.join(_SELECTS[:-1])} or {_SELECTS[-1]}" if "select" in names else ""
        raise UserError(
            f"cache: {spec!r} cannot be read; write {name}({','.join(names)}) with positive numbers{words}, such as "
            f"{_EXAMPLES[name]}"
        )
    return name, {field: value if field == "select" else int(value) for field, value in zip(names, values)}


def _checked(spec: CacheSpec) -> CacheSpec:
    """The spec itself. Raises UserError for sizes and pairs that cannot be."""
    if spec.policy == "budget" and spec.cells <= spec.recent:
        raise UserError(f"cache: {spec} keeps no more cells than recent tokens; give more than {spec.recent} cells")
    if spec.codec == "kivi":
        if spec.bits not in (2, 4):
            raise UserError(f"cache: {spec} has codes of {spec.bits} bits; kivi has 2 or 4")
        if spec.residual % spec.group:
            raise UserError(
                f"cache: {spec}: a residual of {spec.residual} is no whole number of groups of {spec.group}"
            )
        if spec.policy in ("sinks", "budget"):
            lost = {
                "sinks": "the first tokens are read at moving positions",
                "budget": "tokens are given up one by one",
            }
            raise UserError(
                f"cache: {spec} cannot be: kivi codes keys in groups of tokens, but {lost[spec.policy]}; "
                "use int8 or int4 there, or kivi with full or window"
            )
    return spec


def _near(name: str, known: object) -> str:
    near = difflib.get_close_matches(name.split("(")[0], list(known), 1, 0.5)  # pyright: ignore[reportArgumentType]
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"  # pyright: ignore


class CellsSpec(NamedTuple):
    """What the slot of one owner keeps in plain cells.

    cells: of keys and values for each row. ring: whether column c of the tokens lies in cell c modulo `cells`, else in
    cell c. sinks: the first tokens of each row kept beside them. window: tokens that a reader may read at most, itself
    included and sinks apart; None = all.
    """

    owner: int
    cells: int
    ring: bool
    sinks: int
    window: int | None
    codec: str


class KiviSpec(NamedTuple):
    """What the slot of one owner keeps by KIVI (2402.02750): codes in blocks of `residual` tokens, and the newest raw.

    cells: tokens that the blocks have room for, a multiple of `residual`. window: tokens that a reader may read at
    most, itself included, so that the blocks are a ring; None = all. bits, group, residual: as in `CacheSpec`.
    """

    owner: int
    cells: int
    window: int | None
    bits: int
    group: int
    residual: int


class BudgetSpec(NamedTuple):
    """What the slot of one owner keeps where each K/V head chooses its own tokens.

    cells: of the tokens chosen, the last `recent` of the prompt among them. new: cells for tokens after the prompt; h2o
    has one, which is empty again after every step. select: as in `CacheSpec`.
    """

    owner: int
    cells: int
    recent: int
    new: int
    select: str
    codec: str


SlotSpec = CellsSpec | KiviSpec | BudgetSpec  # what the slot of one owner keeps


def grows(slot: SlotSpec) -> bool:
    """Whether the slot needs more room with every token."""
    match slot:
        case CellsSpec():
            return not slot.ring
        case KiviSpec():
            return slot.window is None
        case BudgetSpec():
            return slot.select != "h2o"


def slot_specs(
    config: ModelConfig, spec: CacheSpec, columns: int, total: int | None = None, *, prompt: int = 0
) -> tuple[SlotSpec, ...]:
    """What each slot of the model keeps of `columns` columns of tokens, prompt and new ones together.

    total: the columns that there will ever be, by which it is decided whether a slot is a ring; None = `columns`.
    prompt: the columns of the prompt, after which some budgets choose.
    A budget that would give up nothing is plain cells; that of pyramidkv differs from slot to slot, but does not depend
    on the prompt, so that no row depends on the others of its batch.
    A slot that only sliding windows read keeps the model's own window whatever the policy, since that is the model's
    mathematics; the policy is for the others, the codec for all. Raises UserError for groups that do not fit the heads.
    """
    total = columns if total is None else total
    slots = list(zip(config.sharing.owners, config.sharing.slot_windowed))
    choosing = [owner for owner, windowed in slots if spec.policy == "budget" and not windowed]
    budgets = pyramid(spec.cells, spec.recent, len(choosing)) if spec.select == "pyramidkv" else None
    cells_of = dict(zip(choosing, budgets or [spec.cells] * len(choosing)))
    return tuple(
        _budget_spec(spec, owner, cells_of[owner], columns, total, prompt)
        if owner in cells_of
        else _slot_spec(config, spec, owner, windowed, columns, total)
        for owner, windowed in slots
    )


def _budget_spec(spec: CacheSpec, owner: int, cells: int, columns: int, total: int, prompt: int) -> SlotSpec:
    online = spec.select == "h2o"
    if cells >= (total if online else prompt):
        return CellsSpec(owner, columns, False, 0, None, spec.codec)
    return BudgetSpec(owner, cells, spec.recent, 1 if online else columns - prompt, spec.select, spec.codec)


def _slot_spec(config: ModelConfig, spec: CacheSpec, owner: int, windowed: bool, columns: int, total: int) -> SlotSpec:
    window = config.window if windowed else spec.window if spec.policy in ("window", "sinks") else None
    if window is not None and window >= total:
        window = None
    if spec.codec == "kivi":
        return _kivi_spec(config, spec, owner, window, columns)
    if window is None:
        return CellsSpec(owner, columns, False, 0, None, spec.codec)
    return CellsSpec(owner, window, True, 0 if windowed else spec.sinks, window, spec.codec)


def _kivi_spec(config: ModelConfig, spec: CacheSpec, owner: int, window: int | None, columns: int) -> KiviSpec:
    if config.head_dim % spec.group:
        raise UserError(
            f"cache: {spec} codes values in groups of {spec.group} channels, but the model's head_dim is "
            f"{config.head_dim}; give a group that divides it, such as {math.gcd(spec.group, config.head_dim)}"
        )
    blocks = -(-(columns if window is None else window) // spec.residual)
    return KiviSpec(owner, blocks * spec.residual, window, spec.bits, spec.group, spec.residual)
