"""What may differ between a run and the config that resumes it: every changed field is shown, and weighed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from lckv_jax.config import RunConfig, build_config, config_json
from lckv_jax.errors import UserError

# Every other field changes the mathematics of the steps to come, and must be allowed by name.
_FREE = (
    "out",
    "data.folder",  # its contents are compared by hash
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.save_every",
    "train.save_minutes",
    "train.keep",
    "train.keep_best",
    "model.max_position_embeddings",
    "metrics.",
    "processes.",
)
_ROUNDING = (  # the same numbers, added in another order or computed by another kernel
    "mesh.",
    "model.remat",
    "model.scan_layers",
    "model.attention",
    "train.accumulation",
    "train.loss_chunk",
)
_SHAPE = (  # no checkpoint can be read into a state of other leaves or shapes
    "model.vocab_size",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_layers",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.tie_embeddings",
    "model.attention_bias",
    "model.mlp_bias",
    "optimizer.name",
)
_SWITCHED = ("train.ema_decay", "train.skip_spikes")  # so too where they are turned on or off
_DATA = ("data.sources", "data.validation", "data.validation_fraction")  # what the tokens are

Kind = Literal["free", "rounding", "mathematics", "shape"]
_NOTES: dict[Kind, str] = {
    "free": "",
    "rounding": " (the same up to rounding)",
    "mathematics": " (changes the mathematics)",
    "shape": " (changes what a checkpoint holds)",
}


class Change(NamedTuple):
    """One field whose value differs; `before` and `after` are JSON data."""

    field: str
    before: Any
    after: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.field}: {json.dumps(self.before)} -> {json.dumps(self.after)}{_NOTES[self.kind]}"


def changes(before: RunConfig, after: RunConfig) -> list[Change]:
    """The fields that differ, in the order of the config; `allow_changes` is not one of them."""
    old, new = fields(before), fields(after)
    schedules = before.optimizer.schedule, after.optimizer.schedule
    found = []
    for field in new:
        if old[field] != new[field] and field != "allow_changes":
            kind = _kind(field)
            if field == "train.steps" and schedules == ("constant", "constant"):
                kind = "free"  # no learning rate depends on it
            if field == "train.accumulation" and (before.model.tolerance or after.model.tolerance):
                kind = "mathematics"  # each micro-batch makes the passes that it needs
            if field in _SWITCHED and not (old[field] and new[field]):
                kind = "shape"
            if field == "train.spike_window" and before.train.skip_spikes and after.train.skip_spikes:
                kind = "shape"
            found.append(Change(field, old[field], new[field], kind))
    return found


def read_config(tree: Any, where: str) -> RunConfig:
    """The config in a checkpoint or a config.json, also an older one: absent fields get their defaults.

    Raises UserError that begins with `where`.
    """
    try:
        return build_config(RunConfig, tree, where)
    except UserError as error:
        raise UserError(f"{error}; was it written by a newer version? Use that one, or another `out`") from error


def check_changes(found: Sequence[Change], allowed: Sequence[str], where: str) -> None:
    """Raises UserError if a change needs more than is allowed. where: what has the config before, as in "X has"."""
    shapes = [change for change in found if change.kind == "shape"]
    if shapes:
        raise UserError(
            f"{where} another model or optimiser: {_shown(shapes)}; a checkpoint cannot be read into a state of other "
            "shapes: undo that, or choose another `out`"
        )
    refused = [change for change in found if change.kind == "mathematics" and change.field not in allowed]
    if refused:
        names = ",".join(change.field for change in refused)
        raise UserError(
            f"{where} another config: {_shown(refused)}; undo that, choose another `out`, or go on all the same with "
            f'"allow_changes=[{names}]"'
        )


def check_allowed_names(allowed: Sequence[str]) -> None:
    """Raises UserError if an entry of `allow_changes` is no field of a config."""
    known = _field_names()
    for name in allowed:
        if name not in known:
            last = name.rsplit(".", 1)[-1]
            near = [field for field in known if field.rsplit(".", 1)[-1] == last]
            near = near or [field for field in known if field.startswith(f"{name}.")][:3]
            near = near or difflib.get_close_matches(name, known, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "write section.field, such as train.steps"
            raise UserError(f"allow_changes: {name!r} is no field of a config; {hint}")


def allows_other_data(allowed: Sequence[str]) -> bool:
    """Whether the prepared tokens may be others than those that the run has read so far."""
    return any(field in _DATA for field in allowed)


def _kind(field: str) -> Kind:
    tables: Mapping[Kind, tuple[str, ...]] = {"free": _FREE, "rounding": _ROUNDING, "shape": _SHAPE}
    for kind, names in tables.items():
        if any(field.startswith(name) if name.endswith(".") else field == name for name in names):
            return kind
    return "mathematics"


def fields(config: RunConfig) -> dict[str, Any]:
    """The values of a config by section.field, as JSON data."""
    tree = config_json(config)
    sections = {name for name in tree if isinstance(getattr(config, name), BaseModel)}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= {f"{name}.{field}": inner for field, inner in value.items()} if name in sections else {name: value}
    return flat


def _field_names() -> list[str]:
    names = []
    for name, info in RunConfig.model_fields.items():
        section = info.annotation
        inner = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else None
        names += [f"{name}.{field}" for field in inner] if inner else [name]
    return [name for name in names if name != "allow_changes"]


def _shown(found: Sequence[Change]) -> str:
    shown = ", ".join(f"{c.field} {json.dumps(c.before)} -> {json.dumps(c.after)}" for c in found[:4])
    return shown + (f" and {len(found) - 4} more" if len(found) > 4 else "")
