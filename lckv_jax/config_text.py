"""The text of a configuration: YAML and `a.b=c` overrides into a tree, and a validation error into one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lckv_jax.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-3 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"line {key_node.start_mark.line + 1}: a key must be a word")
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"line {line}: the key {key_node.value!r} is given twice; keep one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _OverrideLoader(_Loader):
    """On the command line nobody means an underscore as a digit separator: 0_6_6 stays text."""


_EXPONENT = re.compile(r"^[-+]?(\d+)(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_OverrideLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_OverrideLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))


def read_yaml(text: str, where: str) -> Any:
    """The data in a YAML text. Raises UserError that begins with `where`."""
    return _parse(text, where, _Loader)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets the value that `section.key=value` means, in place. Raises UserError if it cannot be read."""
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"cannot read the override {override!r}; write section.key=value, such as train.steps=100")
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:  # absent, or a section without entries
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
    tree[last] = _parse(value, f"override {override!r}", _OverrideLoader)


def first_sentence(model: type[BaseModel], error: ValidationError) -> str:
    """The first mistake of a configuration: its key, what is wrong and the mend."""
    problems = _problems(error)
    first = problems[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        message = f"unknown key; {_suggestion(model, first['loc'])}"
    elif first["type"] == "missing":
        message = "is missing and has no default; add it"
    elif first["type"] == "value_error":
        message = str(first.get("ctx", {}).get("error", first["msg"]))
    elif first["type"] == "literal_error":
        message = _unknown_name(str(first["input"]), first.get("ctx", {}).get("expected", ""))
    else:
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
    if path and message.startswith(f"{path.rsplit('.', 1)[-1]}: "):
        message = message.partition(": ")[2]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return (f"{path}: " if path else "") + message + more


def origin(error: ValidationError, where: str, overrides: Sequence[str]) -> str:
    """Where the first mistake comes from: the override that set its key, else `where`, with the overrides beside it."""
    problem = _problems(error)[0]
    path = ".".join(str(part) for part in problem["loc"])
    keys = [(override, override.partition("=")[0]) for override in overrides]
    beside = [override for override, key in keys if not path or key.startswith(f"{path}.")]
    set_by = [override for override, key in keys if path == key or path.startswith(f"{key}.")]
    if problem["type"] == "extra_forbidden":
        set_by += beside  # of a section that there is not
    if set_by:
        return f"override {set_by[-1]!r}"
    return f"{where} with {' '.join(beside)}" if beside else where


def _problems(error: ValidationError) -> list[Any]:
    """A misspelt key also leaves the right one missing: the cause comes first."""
    return sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")


def _unknown_name(given: str, expected: str) -> str:
    names = re.findall(r"'([^']*)'", expected)
    near = difflib.get_close_matches(given.lower(), names, 1, 0.5)
    known = f"known: {', '.join(names)}"
    return f"unknown name {given!r}; " + (f"did you mean {near[0]!r}? ({known})" if near else known)


def _suggestion(model: type[BaseModel], location: tuple[str | int, ...]) -> str:
    """The known key nearest to an unknown one, else all of them."""
    entry = False  # whether the next part is the name of an entry of a mapping
    for part in location[:-1]:
        if isinstance(part, str) and not entry:  # a number is a place in a list; the annotation names what it holds
            annotation = model.model_fields[part].annotation
            model, entry = _inner_model(annotation) or model, get_origin(annotation) is dict
        else:
            entry = False
    near = difflib.get_close_matches(str(location[-1]), model.model_fields, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(model.model_fields)}"


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in an annotation such as `A`, `A | None` or `tuple[A, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _inner_model(inner))), None)


def _parse(text: str, where: str, loader: type[yaml.SafeLoader]) -> Any:
    try:
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 08, which YAML 1.1 reads as octal
        if isinstance(error, UserError):
            raise UserError(f"{where}: {error}") from error
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
