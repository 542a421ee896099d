"""From a run file and command-line overrides to a checked, frozen `RunConfig`.

Every problem of the file, of the overrides, of the model file and between them is reported in one
`ConfigError`, each as `file:line: key: what was wrong, the rule, the remedy`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from relora_ds.config.architecture import model_file, read_model_config
from relora_ds.config.checks import find_doubts, find_problems
from relora_ds.config.explain import explain, missing_key, unknown_key
from relora_ds.config.keys import section_model
from relora_ds.config.model import ModelConfig
from relora_ds.config.reading.document import Document, Finding
from relora_ds.config.reading.override import apply_overrides
from relora_ds.config.reading.source import dump_yaml, read_text, read_yaml
from relora_ds.config.rules.training import batch_divides_over_processes
from relora_ds.config.schema import RunConfig
from relora_ds.errors import ConfigError
from relora_ds.redaction import mask_urls

__all__ = [
    "LoadedRun",
    "check_draft",
    "check_processes",
    "dump_run_config",
    "load_run_config",
    "read_model_config",
    "validate_run",
]


@dataclass(frozen=True)
class LoadedRun:
    """A run that passed every check that needs neither a process group nor a device."""

    config: RunConfig
    """The run description, defaults filled in."""
    architecture: ModelConfig
    """The model that `config.model` names."""
    warnings: tuple[str, ...]
    """Settings that are allowed but probably not meant, to be logged once."""
    document: Document
    """What was read, for messages about its keys later on."""


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """Read a run file, apply `key=value` overrides, validate, and check it against its model.

    Paths inside the file are relative to the current directory. If one key is overridden twice, the
    last one wins.

    Raises:
        ConfigError: anything is wrong with the file, an override, the model file, or between them.
    """
    try:
        document = read_yaml(path)
    except ConfigError as error:
        # the arguments can be judged without the file
        arguments = Document(str(path), {})
        apply_overrides(arguments, overrides)
        raise ConfigError([*error.problems, *arguments.problems]) from None
    apply_overrides(document, overrides)
    sections, findings = _validate(document.data)
    findings += _find_files(sections)
    problems = _problems(document, sections, findings)
    if problems:
        raise ConfigError(problems)
    warnings = document.report(find_doubts(sections))
    architecture = sections.pop("architecture")
    return LoadedRun(RunConfig(**sections), architecture, tuple(warnings), document)


def check_draft(document: Document) -> None:
    """Check a run of which some files may be elsewhere, or not be written yet, like one that loads.

    Raises:
        ConfigError: it will not load, whatever is in the files that are not here.
    """
    sections, findings = _validate(document.data)
    for _ in _find_files(sections):
        pass  # a file that cannot be read keeps only the rules about it from being applied
    problems = _problems(document, sections, findings)
    if problems:
        raise ConfigError(problems)


def validate_run(document: Document) -> RunConfig:
    """The run that a document describes, defaults filled in. No file that it names is looked at.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not one that the key may have.
    """
    sections, findings = _validate(document.data)
    problems = document.problems + document.report(findings)
    if problems:
        raise ConfigError(problems)
    return RunConfig(**sections)


def check_processes(run: LoadedRun, processes: int) -> None:
    """Check the batch against the data-parallel size, which only the launch knows.

    Raises:
        ConfigError: `train.global_batch_size` does not divide evenly over `processes`.
    """
    findings = batch_divides_over_processes(run.config.train, processes)
    problems = run.document.report(findings)
    if problems:
        raise ConfigError(problems)


def dump_run_config(config: RunConfig) -> str:
    """The run as YAML, defaults written out, that `load_run_config` reads to an equal config.

    What is between `//` and `@` of a URL is left out: it is written into files that travel.
    """
    return mask_urls(dump_yaml(config.model_dump(mode="json")))


def _validate(data: dict[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """The valid sections of a run, and what is wrong with the others."""
    sections: dict[str, Any] = {}
    findings = [unknown_key((key,), list(_adapters())) for key in data if key not in _adapters()]
    for name, adapter in _adapters().items():
        field = RunConfig.model_fields[name]
        if name not in data:
            if field.is_required():
                findings.append(missing_key((name,), field.description))
            else:
                sections[name] = field.default
            continue
        try:
            # JSON is where pydantic's strict mode takes a list for a tuple, and still no 1 for true
            sections[name] = adapter.validate_json(json.dumps(data[name]), strict=True)
        except ValidationError as error:
            for inner, message in explain(error, data[name], section_model(field)):
                findings.append(Finding((name, *inner), message))
    return sections, findings


def _problems(document: Document, sections: dict[str, Any], findings: list[Finding]) -> list[str]:
    """What is wrong with a run, its model, which is added to `sections`, and between them.

    Args:
        document: what was read.
        sections: the valid sections that name no file which cannot be read.
        findings: what is known already.
    """
    problems = document.problems + _read_model(sections)
    findings = [*findings, *find_problems(sections)]
    return document.report(findings) + problems


def _find_files(sections: dict[str, Any]) -> Iterator[Finding]:
    """Drop the sections that name unreadable files, so that nothing else trips over them."""
    for key in ("model", "deepspeed"):
        try:
            if key in sections:
                path = sections[key]
                read_text(model_file(path) if key == "model" else path)
        except ConfigError as error:
            yield from (Finding((key,), problem) for problem in error.problems)
            del sections[key]


def _read_model(sections: dict[str, Any]) -> list[str]:
    """Add the model to `sections`; its problems name its own file and lines."""
    try:
        if "model" in sections:
            sections["architecture"] = read_model_config(sections["model"])
    except ConfigError as error:
        return error.problems
    return []


@cache
def _adapters() -> dict[str, TypeAdapter[Any]]:
    """One validator per top-level key, so that one broken section does not hide the others."""
    return {
        name: TypeAdapter(Annotated[field.annotation, field])  # pyright: ignore
        for name, field in RunConfig.model_fields.items()
    }
