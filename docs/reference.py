"""Writes the references of settings in docs/ from the descriptions of the configs' own fields.

python -m docs.reference
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lckv_jax.config import RunConfig
from lckv_jax.evaluate.suite_config import SuiteConfig
from lckv_jax.share.share_config import ShareConfig
from lckv_jax.sharing import KVSharing

PAGES: dict[str, type[BaseModel]] = {"training.md": RunConfig, "evaluate.md": SuiteConfig, "share.md": ShareConfig}
MARKS = ("<!-- reference: made by `python -m docs.reference` -->\n", "<!-- end of the reference -->\n")


def page_with_reference(page: str, config: type[BaseModel] = RunConfig) -> str:
    """`page` with a fresh reference between its marks."""
    before, rest = page.split(MARKS[0])
    return before + MARKS[0] + "\n" + reference(config) + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


def reference(config: type[BaseModel]) -> str:
    """A table of the fields of each section of a config, and of the mappings inside them."""
    first: dict[type[BaseModel], str] = {}
    for path, model in sections(config, ""):
        first.setdefault(model, path)
    return "\n".join(line for model, path in first.items() for line in _table(path, model)).strip() + "\n"


def sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The models in `model`, itself first, with the dotted path of their keys."""
    yield path, model
    for name, field in model.model_fields.items():
        below = f"{path}{name}.NAME." if get_origin(field.annotation) is dict else f"{path}{name}."
        for inner in _models(field.annotation):
            yield from sections(inner, below)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _is_section(annotation: Any) -> bool:
    return bool(_models(annotation)) and get_origin(annotation) is not tuple


def _table(path: str, model: type[BaseModel]) -> Iterator[str]:
    own = {name: field for name, field in model.model_fields.items() if path or not _is_section(field.annotation)}
    whole = model.__name__.removesuffix("Config").lower()
    yield f"### `{path[:-1]}`" if path else f"### The {whole}"
    yield ""
    yield " ".join((model.__doc__ or "").split())
    yield ""
    yield "| key | values | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in own.items():
        cells = (f"`{path}{name}`", _values(field), _default(field), field.description or "")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _values(field: FieldInfo) -> str:
    return ", ".join([_type(field.annotation), *_bounds(field)])


def _bounds(field: FieldInfo) -> list[str]:
    return [
        f"{sign} {getattr(item, attribute)}"
        for item in field.metadata
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(item, attribute, None) is not None
    ]


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [text for item in arguments[1:] if isinstance(item, FieldInfo) for text in _bounds(item)]
        return " ".join([_type(arguments[0]), *bounds])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        inner = [_type(argument) for argument in arguments if argument is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    if annotation is NoneType:
        return "null"
    if annotation is KVSharing:
        return "map"
    if isinstance(annotation, type):
        names = {int: "integer", float: "number", str: "text", bool: "true, false"}
        return names.get(annotation, "mapping" if issubclass(annotation, BaseModel) else annotation.__name__)
    return " or ".join(_type(argument) for argument in arguments)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return f"`{_plain(field.default)}`"


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        given = {name: getattr(value, name) for name in value.model_fields_set}
        return "{" + ", ".join(f"{name}: {_plain(entry)}" for name, entry in given.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def main() -> None:
    for name, config in PAGES.items():
        page = Path(__file__).parent / name
        page.write_text(page_with_reference(page.read_text(encoding="utf-8"), config), encoding="utf-8")


if __name__ == "__main__":
    main()
