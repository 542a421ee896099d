"""Write docs/configuration.md: every key of a run file, read off the schema.

Example:
    python tools/describe_config.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from relora_ds.config.base import Section
from relora_ds.config.keys import section_models
from relora_ds.config.schema import RunConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
_INTRO = """# Configuration

Every key of a run file. `python tools/describe_config.py` writes this page from the schema; a test
holds it current.

A run is one YAML file ([complete example](../configs/run/quickstart.yaml)). Any key can be
overridden on the command line by its dotted name, with a value in YAML: `method.rank=64`,
`'method={name: full}'`. Paths are relative to the current directory. All mistakes are reported at
once, with file, line and the nearest valid name (exit code 2). The model file has Hugging Face's
`LlamaConfig` keys. The ZeRO file has DeepSpeed's own: `"auto"` is the run's value or
DeepSpeed's default, a value that contradicts the run is an error, and options that
corrupt or leak state are refused with the reason.
"""
_NAMES = {
    int: "integer",
    float: "number",
    bool: "`true` or `false`",
    str: "text",
    NoneType: "`null`",
}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def describe() -> str:
    """The page."""
    return "\n".join([_INTRO, *_section(RunConfig, "", "The run")])


def _section(model: type[Section], prefix: str, title: str) -> Iterator[str]:
    """A heading, the model's meaning and a table of its plain keys; then its sections."""
    yield f"##{'#' * max(0, prefix.count('.') - 1)} {title}\n\n{_text(model.__doc__)}\n"
    plain, nested = [], []
    for name, field in model.model_fields.items():
        models = section_models(field)
        if models:
            nested.append((name, field, models))
        else:
            plain.append((name, field))
    # what tells the variants of a section apart comes before what they inherit
    plain.sort(key=lambda item: not _is_tag(item[1]))
    if plain:
        yield "| key | values | default | meaning |\n|---|---|---|---|"
        yield from (_row(prefix + name, field) for name, field in plain)
        yield ""
    for name, field, models in nested:
        for section in models:
            needed = " (required)" if field.is_required() else ""
            title = f"`{prefix}{name}{_variant(section)}`{needed}"
            yield from _section(section, f"{prefix}{name}.", title)


def _variant(model: type[Section]) -> str:
    """What tells a section from the others that may stand in its place; empty if none may."""
    tags = [(name, field) for name, field in model.model_fields.items() if _is_tag(field)]
    return "".join(f".{name}: {get_args(field.annotation)[0]}" for name, field in tags)


def _is_tag(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def _row(name: str, field: FieldInfo) -> str:
    default = (
        "required"
        if field.is_required()
        else f"`{_yaml(field.get_default(call_default_factory=True))}`"
    )
    values = _values(field.annotation, field.metadata)
    cells = (f"`{name}`", values, default, _text(field.description))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    """What may be written for a type, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0], _flat(arguments[1:]))
    if origin is Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_values(argument, constraints) for argument in arguments)
    if origin is list or arguments[1:] == (Ellipsis,):
        return f"list of ({_values(arguments[0])})"
    if origin is tuple:
        return f"[{', '.join(_values(argument) for argument in arguments)}]"
    return _NAMES[annotation] + (_bounds(constraints) if annotation in (int, float) else "")


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _bounds(constraints: Iterable[Any]) -> str:
    found = [
        f"{sign} {getattr(constraint, name):g}"
        for constraint in constraints
        for name, sign in _BOUNDS
        if getattr(constraint, name, None) is not None
    ]
    return f" {' and '.join(found)}" if found else ""


def _yaml(value: object) -> str:
    """A value as it is written in a run file."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _text(text: str | None) -> str:
    return " ".join((text or "").split())


def main() -> None:
    """Write the page."""
    PAGE.write_text(describe().rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
