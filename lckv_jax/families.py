"""The named families of sharing maps, each from its paper: family text -> map entries."""

from __future__ import annotations

import difflib
import itertools
import re

from lckv_jax.errors import UserError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"sharing: {message}")


def _standard(num_layers: int) -> list[str]:
    return [str(layer) for layer in range(num_layers)]


def _lckv(num_layers: int, warmup: int = 2) -> list[str]:
    """LCKV (2405.10637, 2.1): warmup/2 ordinary layers at each end; the middle reads its highest layer."""
    _require(warmup % 2 == 0, f"lckv(warmup={warmup}): half of the warm-up layers go to each end; give an even number")
    _require(
        0 <= warmup < num_layers,
        f"lckv(warmup={warmup}): a model of {num_layers} layers has room for 0 to {(num_layers - 1) // 2 * 2}",
    )
    half = warmup // 2
    target = num_layers - 1 - half
    return [str(target if half <= layer <= target else layer) for layer in range(num_layers)]


def _cla(num_layers: int, group: int = 2) -> list[str]:
    """CLA (2405.12981): each group of `group` layers reads its lowest; the last group may be smaller."""
    _require(1 <= group <= num_layers, f"cla(group={group}): give 1 to {num_layers} layers a group")
    return [str(layer - layer % group) for layer in range(num_layers)]


def _yoco(num_layers: int) -> list[str]:
    """YOCO (2405.05254): windowed layers below, then the upper half (larger if odd) reads its lowest layer."""
    _require(num_layers >= 2, "yoco: needs at least 2 layers")
    half = num_layers // 2
    return [f"{layer}s" for layer in range(half)] + [str(half)] * (num_layers - half)


def _mlkv(num_layers: int, kv_layers: int) -> list[str]:
    """MLKV (2406.09297): kv_layers consecutive groups, each reading its lowest layer."""
    return _grid(num_layers, "lasagna", "bottom", kv_layers)


def _trailing(num_layers: int, shared: int) -> list[str]:
    """The last `shared` layers read the layer just below them (Gemma's and MaxText's `num_kv_shared_layers`)."""
    _require(0 <= shared < num_layers, f"trailing(shared={shared}): give 0 to {num_layers - 1} of {num_layers} layers")
    return [str(min(layer, num_layers - 1 - shared)) for layer in range(num_layers)]


def _grid(num_layers: int, partition: str, target: str, kv_layers: int) -> list[str]:
    """The systematic study's grid (2410.14442): partition x target position, with layer 0 always an owner.

    pizza: the first kv_layers-1 layers own, the rest is one group. sandwich: ceil((kv_layers-1)/2) layers at the
    bottom and the other owners at the top, the middle is one group. lasagna: consecutive groups. A group reads its
    bottom, middle (floor of first and last) or top layer. The paper leaves two things open, decided here: group sizes
    differ by at most one, larger groups lower; and for lasagna with a middle or top target layer 0 is a group of its
    own, so that exactly kv_layers layers own.
    """
    _require(
        partition in ("pizza", "sandwich", "lasagna"),
        f"grid: partition is pizza, sandwich or lasagna, not {partition!r}",
    )
    _require(target in ("bottom", "middle", "top"), f"grid: target is bottom, middle or top, not {target!r}")
    _require(
        1 <= kv_layers <= num_layers, f"grid: kv_layers={kv_layers} of {num_layers} layers; give 1 to {num_layers}"
    )
    _require(
        kv_layers > 1 or target == "bottom" or num_layers == 1,
        f"grid: with kv_layers=1 and target={target} layer 0 would not own keys and values; "
        "give at least 2, or lckv(warmup=0) if that is what you want",
    )
    if partition == "lasagna":
        alone = 0 if target == "bottom" else 1
        groups = [(0, 1)] * alone + _cut(alone, num_layers, kv_layers - alone)
    else:
        bottom = kv_layers - 1 if partition == "pizza" else kv_layers // 2
        top = kv_layers - 1 - bottom
        own_bottom = [(layer, layer + 1) for layer in range(bottom)]
        own_top = [(layer, layer + 1) for layer in range(num_layers - top, num_layers)]
        groups = [*own_bottom, (bottom, num_layers - top), *own_top]
    entries: list[str] = []
    for first, stop in groups:
        source = {"bottom": first, "middle": (first + stop - 1) // 2, "top": stop - 1}[target]
        entries += [str(source)] * (stop - first)
    return entries


def _cut(first: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """first..stop-1 in `parts` consecutive groups whose sizes differ by at most one, larger ones first."""
    if parts == 0:
        return []
    size, larger = divmod(stop - first, parts)
    ends = list(itertools.accumulate([size + 1] * larger + [size] * (parts - larger), initial=first))
    return list(itertools.pairwise(ends))


_FAMILIES = {
    "standard": _standard,
    "lckv": _lckv,
    "cla": _cla,
    "yoco": _yoco,
    "mlkv": _mlkv,
    "trailing": _trailing,
    "grid": _grid,
}


def family_entries(text: str, num_layers: int) -> list[str]:
    """The map entries of `name` or `name(argument=value, ...)` for a model of `num_layers` layers."""
    match = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", text)
    name = match[1].lower() if match else text
    if not match or name not in _FAMILIES:
        near = difflib.get_close_matches(name, _FAMILIES, 2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known families: {', '.join(_FAMILIES)}"
        raise UserError(f"sharing: {text!r} is neither a map such as 0_6_6_6_6_6_6_7 nor a known family; {hint}")
    family = _FAMILIES[name]
    names = [arg for arg in family.__code__.co_varnames[1 : family.__code__.co_argcount]]
    positional, keywords = [], {}
    for item in filter(None, (part.strip() for part in (match[2] or "").split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        number = value if equals else key
        argument = int(number) if re.fullmatch(r"-?\d+", number) else number
        if not equals:
            positional.append(argument)
        elif key in keywords:
            raise UserError(f"sharing: {name}: {key} is given twice in {text!r}; keep one")
        elif key in names:
            keywords[key] = argument
        else:
            raise UserError(f"sharing: {name} has no argument {key!r}; it takes {', '.join(names) or 'none'}")
    arguments = dict(zip(names, positional), **keywords)
    required = names[: len(names) - len(family.__defaults__ or ())]
    missing = [arg for arg in required if arg not in arguments]
    if missing or len(positional) > len(names) or set(keywords) & set(names[: len(positional)]):
        raise UserError(f"sharing: cannot read {text!r}; write {name}({', '.join(f'{arg}=...' for arg in names)})")
    for arg, value in arguments.items():
        expects_word = arg in ("partition", "target")
        if expects_word != isinstance(value, str):
            raise UserError(f"sharing: {name}: {arg}={value!r} is not a {'word' if expects_word else 'number'}")
    return family(num_layers, **arguments)
