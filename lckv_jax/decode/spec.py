"""What a cache keeps and how: one text such as `sinks(4,1020)+int8`, and what it means for each slot of a model."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import NamedTuple

from lckv_jax.config import ModelConfig
from lckv_jax.decode.codecs import CODE_BYTES
from lckv_jax.errors import UserError

_POLICIES = {"full": (), "window": ("window",), "sinks": ("sinks", "window")}


@dataclass(frozen=True)
class CacheSpec:
    """Which tokens are kept (policy) and as what (codec).

    policy: `full`; `window` = the last `window` tokens, the current one included; `sinks` = those and the first `sinks`
    tokens (StreamingLLM, 2309.17453: positions are those in the cache, so that a stream may be endless).
    codec: `raw` = the compute dtype; `int8`, `int4` = symmetric, one scale for each token and head.
    """

    policy: str = "full"
    sinks: int = 0
    window: int = 0
    codec: str = "raw"

    @classmethod
    def parse(cls, spec: CacheSpec | str) -> CacheSpec:
        """The cache that a text means: POLICY, POLICY(numbers), CODEC or POLICY+CODEC. Raises UserError."""
        if isinstance(spec, CacheSpec):
            return spec
        parts = [part.strip() for part in spec.split("+")]
        if len(parts) > 2 or not all(parts):
            raise UserError(f"cache: {spec!r} is not POLICY+CODEC; write, for example, sinks(4,1020)+int8")
        policy, codec = (parts[0], parts[1]) if len(parts) == 2 else (parts[0], "raw")
        if len(parts) == 1 and policy in CODE_BYTES:
            policy, codec = "full", policy
        if codec not in CODE_BYTES:
            raise UserError(f"cache: there is no codec {codec!r}; {_near(codec, CODE_BYTES)}")
        match = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", policy)
        if not match or match[1] not in _POLICIES:
            raise UserError(f"cache: there is no policy {policy!r}; {_near(policy, _POLICIES)}")
        return cls(match[1], codec=codec, **_numbers(spec, match[1], match[2] or ""))

    def __str__(self) -> str:
        """The text that `parse` reads."""
        numbers = ",".join(str(getattr(self, name)) for name in _POLICIES[self.policy])
        return self.policy + (f"({numbers})" if numbers else "") + (f"+{self.codec}" if self.codec != "raw" else "")


def _numbers(spec: str, policy: str, text: str) -> dict[str, int]:
    names = _POLICIES[policy]
    values = [value.strip() for value in text.split(",")] if text.strip() else []
    if len(values) != len(names) or not all(re.fullmatch(r"[1-9]\d*", value) for value in values):
        example = f"{policy}({','.join(names)})" if names else policy
        raise UserError(f"cache: {spec!r} cannot be read; write {example}, each a positive number of tokens")
    return {name: int(value) for name, value in zip(names, values)}


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


SlotSpec = CellsSpec  # what the slot of one owner keeps


def slot_specs(config: ModelConfig, spec: CacheSpec, columns: int, total: int | None = None) -> tuple[SlotSpec, ...]:
    """What each slot of the model keeps of `columns` columns of tokens, prompt and new ones together.

    total: the columns that there will ever be, by which it is decided whether a slot is a ring; None = `columns`.
    A slot that only sliding windows read keeps the model's own window whatever the policy, since that is the model's
    mathematics; the policy is for the others, the codec for all.
    """
    specs, total = [], columns if total is None else total
    for owner, windowed in zip(config.sharing.owners, config.sharing.slot_windowed):
        window = config.window if windowed else spec.window if spec.policy != "full" else None
        sinks = 0 if windowed else spec.sinks
        if window is None or window >= total:
            specs.append(CellsSpec(owner, columns, False, 0, None, spec.codec))
        else:
            specs.append(CellsSpec(owner, window, True, sinks, window, spec.codec))
    return tuple(specs)
