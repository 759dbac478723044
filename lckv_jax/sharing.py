"""KVSharing: which layer uses whose keys and values. Nobody else parses a map or compares layer indices."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lckv_jax.errors import UserError
from lckv_jax.families import family_entries


class Span(NamedTuple):
    """Layers start..stop-1, solved together; cyclic if one of them reads a layer above itself."""

    start: int
    stop: int
    cyclic: bool


class Run(NamedTuple):
    """Layers start..stop-1 of a span with one source rule, so that they can be scanned as one.

    source: the layer whose K,V all of them read; None if each reads its own.
    owners: whether they compute K,V.
    upward: whether they read a layer above themselves.
    windowed: whether they read through the sliding window.
    """

    start: int
    stop: int
    source: int | None
    owners: bool
    upward: bool
    windowed: bool


class Flops(NamedTuple):
    """Floating point operations a token: one evaluation with all passes, and one training step."""

    forward: float
    train: float


@dataclass(frozen=True)
class KVSharing:
    """A sharing map. sources[i] is the layer whose keys and values layer i reads; windowed[i] if through the window.

    An entry is taken at its word: layer i reads the K,V that layer sources[i] computes, also where that layer itself
    reads another one (2405.10637 main code, `layer_types`). Build it with `KVSharing.parse`.
    """

    sources: tuple[int, ...]
    windowed: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sharing: the map is empty; give one entry a layer")
        if len(self.windowed) != len(self.sources):
            raise UserError(
                f"sharing: {len(self.sources)} sources but {len(self.windowed)} window marks; give one a layer"
            )
        for layer, source in enumerate(self.sources):
            if not 0 <= source < len(self.sources):
                raise UserError(
                    f"sharing: layer {layer} reads layer {source}, which does not exist; "
                    f"use 0 to {len(self.sources) - 1}"
                )

    @classmethod
    def parse(cls, spec: KVSharing | str | Sequence[int | str], num_layers: int) -> KVSharing:
        """The map that `spec` means for a model of `num_layers` layers.

        spec: the official string `0_6_6_6_6_6_6_7` (suffix `s` = sliding window), a list of such entries, run-length
        text `0 20*20 21` (SOURCE*COUNT), or a family: `standard`, `lckv(warmup=2)`, `cla(group=2)`, `yoco`,
        `mlkv(kv_layers=4)`, `trailing(shared=4)`, `grid(partition=sandwich, target=middle, kv_layers=3)`.
        Raises UserError naming the layer, what is wrong and the mend.
        """
        if num_layers < 1:
            raise UserError(f"sharing: num_layers is {num_layers}; a model has at least 1 layer")
        if isinstance(spec, KVSharing):
            entries: list[str] = str(spec).split("_")
        elif isinstance(spec, (int, float)) and not isinstance(spec, bool):
            raise UserError(
                f"sharing: got the number {spec}, because YAML 1.1 reads the underscores of an unquoted map "
                'as one number; quote it, as in sharing: "0_6_6_6_6_6_6_7"'
            )
        elif isinstance(spec, str):
            entries = _entries_of_text(spec.strip(), num_layers)
        elif isinstance(spec, Sequence):
            entries = [_entry_of_item(layer, item) for layer, item in enumerate(spec)]
        else:
            raise UserError(f"sharing: expected a map as text or a list, got {type(spec).__name__} {spec!r}")
        if len(entries) != num_layers:
            odd = min(len(entries), num_layers)
            raise UserError(
                f"sharing: the map has {len(entries)} entries ({_shorten('_'.join(entries))}) but the model has "
                f"{num_layers} layers: layer {odd} {'has no entry' if odd < num_layers else 'does not exist'}; "
                "give one entry a layer or change num_layers"
            )
        parsed = [_parse_entry(layer, entry) for layer, entry in enumerate(entries)]
        return cls(tuple(source for source, _ in parsed), tuple(windowed for _, windowed in parsed))

    def __str__(self) -> str:
        """The official string (`layer_types`)."""
        return "_".join(f"{source}{'s' * windowed}" for source, windowed in zip(self.sources, self.windowed))

    @property
    def num_layers(self) -> int:
        return len(self.sources)

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The layers that compute K,V, ascending: those that some layer reads. Slot c belongs to owners[c]."""
        return tuple(sorted(set(self.sources)))

    @cached_property
    def slot_of(self) -> tuple[int, ...]:
        """For each layer, the slot that it reads."""
        return tuple(self.owners.index(source) for source in self.sources)

    @cached_property
    def upward(self) -> tuple[bool, ...]:
        """For each layer, whether its source lies above it, so that it reads strictly earlier tokens."""
        return tuple(source > layer for layer, source in enumerate(self.sources))

    @property
    def cyclic(self) -> bool:
        """Whether any layer reads upward, so that training needs passes."""
        return any(self.upward)

    def donors(self, slot: int) -> tuple[int, ...]:
        """The layers that read `slot`; their K/V projections are averaged when a finished model takes this map."""
        return tuple(layer for layer, read in enumerate(self.slot_of) if read == slot)

    def spans(self) -> tuple[Span, ...]:
        """The spans in order, as in the official iteration plan.

        From the first upward layer, the end grows until no layer inside reads above it; the other layers between such
        spans form spans that are evaluated once.
        """
        spans, start = [], 0
        while start < self.num_layers:
            cyclic, stop = self.upward[start], start + 1
            if cyclic:
                while (reach := max(self.sources[start:stop]) + 1) > stop:
                    stop = reach
            else:
                while stop < self.num_layers and not self.upward[stop]:
                    stop += 1
            spans.append(Span(start, stop, cyclic))
            start = stop
        return tuple(spans)

    def runs(self, span: Span) -> tuple[Run, ...]:
        """The runs of a span in order.

        Layers share a run if they read one slot that none of them computes, or if each reads only its own and nobody
        else reads it. So the last layer of a cyclic span, which others read, is a run of its own: the highest owner,
        which computes only K,V in every pass but the last.
        """

        def rule(layer: int) -> tuple:
            upward, windowed = self.upward[layer], self.windowed[layer]
            if layer not in self.owners:
                return ("reads", self.sources[layer], upward, windowed)
            private = self.donors(self.owners.index(layer)) == (layer,)
            return ("own", None if private else layer, upward, windowed)

        runs = []
        for _, group in itertools.groupby(range(span.start, span.stop), key=rule):
            layers = list(group)
            first = layers[0]
            source = None if self.sources[first] == first else self.sources[first]
            runs.append(
                Run(first, first + len(layers), source, first in self.owners, self.upward[first], self.windowed[first])
            )
        return tuple(runs)

    def upward_sources(self, span: Span) -> tuple[int, ...]:
        """The owners that upward layers of the span read: their K,V are what one pass hands to the next."""
        layers = range(span.start, span.stop)
        return tuple(sorted({self.sources[layer] for layer in layers if self.upward[layer]}))

    @cached_property
    def shared_owners(self) -> tuple[int, ...]:
        """The owners whose K,V another layer reads."""
        return tuple(owner for slot, owner in enumerate(self.owners) if self.donors(slot) != (owner,))

    @cached_property
    def slot_windowed(self) -> tuple[bool, ...]:
        """For each slot, whether all of its readers read through the sliding window."""
        return tuple(all(self.windowed[layer] for layer in self.donors(slot)) for slot in range(len(self.owners)))

    def cache_tokens(self, seq_len: int, window: int) -> tuple[int, ...]:
        """The tokens of a row of `seq_len` that each slot keeps: what its widest reader needs."""
        return tuple(min(window, seq_len) if windowed else seq_len for windowed in self.slot_windowed)

    def cache_bytes_per_token(self, num_kv_heads: int, head_dim: int, element_bytes: int = 2) -> int:
        """Bytes of K,V held for one token of context while windows are not full (2 for K and V; bf16 unless said)."""
        return 2 * len(self.owners) * num_kv_heads * head_dim * element_bytes

    def flops(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        vocab_size: int,
        seq_len: int,
        window: int | None = None,
        no_grad_passes: int = 7,
        grad_passes: int = 2,
        start: str = "zero",
        strict_everywhere: bool = False,
    ) -> Flops:
        """Matrix-product FLOPs a token at sequence length `seq_len` (2 a multiply-add; backward = 2 forwards).

        Counts what is computed: in every pass but the last, the highest owner of a cyclic span computes K,V only; the
        first pass from a zero start has no attention in upward layers, a start from the input projects its K,V once
        more; head and later spans run once. Attention
        counts only the keys that a query may read. Recomputation (remat) is not counted.
        """
        queries = 4 * hidden_size * num_heads * head_dim  # wq and wo
        kv = 4 * hidden_size * num_kv_heads * head_dim  # wk and wv
        mlp = 6 * hidden_size * intermediate_size

        def attention(layer: int) -> float:
            length = min(window, seq_len) if window and self.windowed[layer] else seq_len
            keys = length - length * (length - 1) / (2 * seq_len) - (self.upward[layer] or strict_everywhere)
            return queries + 4 * num_heads * head_dim * keys

        def one_pass(span: Span, *, first: bool, last: bool) -> float:
            total = 0.0
            for layer in range(span.start, span.stop):
                total += kv * (layer in self.owners)
                if last or layer != span.stop - 1:
                    total += mlp + (0.0 if first and self.upward[layer] else attention(layer))
            return total

        frozen = trained = 0.0
        passes = no_grad_passes + grad_passes
        for span in self.spans():
            if span.cyclic and start == "input":
                frozen += kv * len(self.upward_sources(span))
            for number in range(passes if span.cyclic else 1):
                last = not span.cyclic or number == passes - 1
                cost = one_pass(span, first=span.cyclic and number == 0 and start == "zero", last=last)
                if span.cyclic and number < no_grad_passes:
                    frozen += cost
                else:
                    trained += cost
        trained += 2 * hidden_size * vocab_size
        return Flops(forward=frozen + trained, train=frozen + 3 * trained)

    def diagram(self) -> str:
        """The map as text, top layer first: who computes K,V, who reads whom, and what is solved by passes."""
        span_of = {layer: span for span in self.spans() for layer in range(span.start, span.stop)}
        lines = []
        for layer in reversed(range(self.num_layers)):
            source, span = self.sources[layer], span_of[layer]
            owner = "[K,V]" if layer in self.owners else "     "
            if source == layer:
                reads = "reads itself"
            elif source > layer:
                reads = f"reads {source} ^ (strictly earlier tokens)"
            else:
                reads = f"reads {source} v"
            if self.windowed[layer]:
                reads += ", sliding window"
            bar = " " if not span.cyclic else "+" if layer in (span.start, span.stop - 1) else "|"
            note = f" {span.start}-{span.stop - 1}: m + b passes" if span.cyclic and layer == span.stop - 1 else ""
            lines.append(f"{layer:>4} {owner}  {reads:<46}{bar}{note}".rstrip())
        return "\n".join(lines)


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _entry_of_item(layer: int, item: int | str) -> str:
    if isinstance(item, bool) or not isinstance(item, (int, str)):
        raise UserError(f"sharing: layer {layer}: expected a layer number such as 6 or '6s', got {item!r}")
    return str(item)


def _parse_entry(layer: int, entry: str) -> tuple[int, bool]:
    match = re.fullmatch(r"(\d+)(s?)", entry.strip())
    if not match:
        raise UserError(
            f"sharing: layer {layer}: {entry!r} is not a layer number with an optional 's' for a sliding window; "
            "write, for example, 6 or 6s"
        )
    return int(match[1]), bool(match[2])


def _entries_of_text(text: str, num_layers: int) -> list[str]:
    """The entries that a text spec stands for."""
    if not text:
        raise UserError("sharing: the map is empty; give one entry a layer, or a family such as lckv(warmup=2)")
    if text[0].isalpha():
        return family_entries(text, num_layers)
    if "*" not in text and not re.search(r"\s", text):
        return text.split("_")
    entries: list[str] = []
    for item in text.split():
        match = re.fullmatch(r"(\d+s?)(?:\*([1-9]\d*))?", item)
        if not match:
            raise UserError(
                f"sharing: layer {len(entries)}: {item!r} is not SOURCE or SOURCE*COUNT; write, for example, 0 20*20 21"
            )
        entries += [match[1]] * int(match[2] or 1)
    return entries
