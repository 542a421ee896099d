"""pydantic's errors in the words of the file: what was wrong, the rule, the remedy.

pydantic names the branch of a union inside an error's location (`('method', 'relora', 'rank')`) and
reports one error per branch; users see keys only, and one problem per value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from relora_ds.config.base import Section
from relora_ds.config.keys import run_keys, section_model
from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.methods.catalogue import method_models
from relora_ds.config.reading.document import Finding, KeyPath, show
from relora_ds.config.reading.suggest import did_you_mean

_RULES = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_pattern_mismatch": "must be a path",
    "string_too_long": "must be a path",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a section of keys",
    "model_type": "must be a section of keys",
}


class _Located(NamedTuple):
    site: KeyPath  # the value whose union was tried, or the full path where there is no union
    path: KeyPath
    error: ErrorDetails


def explain(error: ValidationError, data: object, model: type[Section] | None) -> list[Finding]:
    """Findings for a section that does not validate, with paths relative to the section.

    Args:
        error: what validating `data` raised.
        data: the section as it was read.
        model: its model, None for a plain value; `MethodSettings` stands for the one of them that
            `name` chooses.
    """
    tagged = model is MethodSettings
    located = [_locate(detail, data, tagged=tagged) for detail in error.errors()]
    if tagged:
        name = data.get("name") if isinstance(data, dict) else None
        model = method_models().get(name) if isinstance(name, str) else None
    findings = []
    for _, group in groupby(located, key=lambda item: item.site):
        findings += _merge(list(group), data, model)
    return findings


def unknown_key(path: KeyPath, valid: Sequence[str]) -> Finding:
    """The finding for a key that the section does not have."""
    name = str(path[-1])
    return Finding(path, f"unknown key; {did_you_mean(name, valid, run_keys())}")


def missing_key(path: KeyPath, meaning: str | None) -> Finding:
    """The finding for a key that has no default and is not there."""
    text = " ".join((meaning or "a value is needed").split())
    return Finding(path, f"is missing and has no default. Its meaning: {text}")


def _locate(error: ErrorDetails, data: object, *, tagged: bool) -> _Located:
    location = error["loc"][1:] if tagged else error["loc"]
    path: KeyPath = ()
    site: KeyPath | None = None
    value: Any = data
    for index, part in enumerate(location):
        absent = error["type"] == "missing" and index == len(location) - 1
        if _leads_on(value, part):
            value = value[part]
        elif not absent:
            # the name of a union's branch: it leads nowhere in the data
            site = path if site is None else site
            continue
        path = (*path, part)
    return _Located(path if site is None else site, path, error)


def _leads_on(value: object, part: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _merge(group: list[_Located], data: object, model: type[Section] | None) -> Iterator[Finding]:
    deeper = [item for item in group if len(item.path) > len(item.site)]
    if deeper or len(group) == 1:
        # a branch that got further is the one that was meant
        yield from (_finding(item.path, item.error, model) for item in deeper or group)
        return
    # the same for every branch: the value fits none of them
    value = group[0].error["input"]
    rules = [_rule(item.error).removeprefix("must be ") for item in group]
    yield Finding(group[0].path, f"is {show(value)}, but must be {' or '.join(rules)}")


def _finding(path: KeyPath, error: ErrorDetails, model: type[Section] | None) -> Finding:
    kind = error["type"]
    if kind == "union_tag_invalid":
        known = list(method_models())
        value = error["input"]["name"]
        rule = f"must be one of {', '.join(known)}"
        remedy = did_you_mean(value, known) if isinstance(value, str) else "write one of them"
        return Finding(("name",), f"is {show(value)}, but {rule}; {remedy}")
    if kind == "union_tag_not_found":
        return Finding(("name",), f"is missing; write one of {', '.join(method_models())}")
    if kind == "extra_forbidden":
        return _unexpected(path, model)
    if kind == "missing" and isinstance(path[-1], str):
        section = _section_at(model, path[:-1])
        return missing_key(path, section and section.model_fields[path[-1]].description)
    if kind == "missing":
        return Finding(path[:-1], f"is {show(error['input'])}, but needs an entry [{path[-1]}]")
    remedy = _remedy(kind, error["input"])
    message = f"is {show(error['input'])}, but {_rule(error)}"
    return Finding(path, f"{message}: {remedy}" if remedy else message)


def _unexpected(path: KeyPath, model: type[Section] | None) -> Finding:
    name = str(path[-1])
    section = _section_at(model, path[:-1])
    valid = list(section.model_fields) if section else []
    owners = [tag for tag, other in method_models().items() if name in other.model_fields]
    current = next((tag for tag, other in method_models().items() if other is model), None)
    if current is not None and len(path) == 1 and owners:
        return Finding(
            path,
            f"belongs to method {' and '.join(owners)}, but this run's method is {current}: "
            "remove the key or change `method.name`",
        )
    return unknown_key(path, valid)


def _section_at(model: type[Section] | None, path: KeyPath) -> type[Section] | None:
    for part in path:
        field = model.model_fields.get(str(part)) if model else None
        model = section_model(field) if field else None
    return model


def _rule(error: ErrorDetails) -> str:
    kind: str = error["type"]
    if kind == "too_long":
        return f"must have {error.get('ctx', {}).get('max_length')} entries"
    return _RULES.get(kind, error["msg"].replace("Input should", "must"))


def _remedy(kind: str, value: Any) -> str | None:
    if kind == "bool_type" and isinstance(value, str) and value.lower() in _NOT_BOOLEANS:
        return f"{value} is text in YAML 1.2, write true or false"
    if kind in ("int_type", "float_type") and isinstance(value, str) and _is_number(value):
        return "write the number plainly, without quotes or underscores"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind == "string_type" and isinstance(value, (int, float)):
        return "put it in quotes"
    if value is None:
        return "give a value, or remove the key to get its default"
    return None


_NOT_BOOLEANS = frozenset({"yes", "no", "on", "off", "y", "n", "true", "false"})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
