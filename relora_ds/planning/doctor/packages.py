"""Checks of interpreter and packages. Needs none of them, so that it can say which are missing."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from relora_ds.planning.doctor.finding import Finding

_PYTHONS = ((3, 11), (3, 13))
_PROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"


def python_version() -> Iterator[Finding]:
    """Whether this interpreter is one of those that are tested."""
    version, (first, last) = sys.version_info[:2], _PYTHONS
    said = f"Python {platform.python_version()} at {sys.executable}"
    if first <= version <= last:
        yield Finding("python", "ok", said)
    else:
        tested = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
        remedy = f"make an environment of Python {tested}: bash launch/quickstart.sh does"
        yield Finding("python", "problem" if version < first else "warning", said, remedy)


def packages() -> Iterator[Finding]:
    """Whether what is installed is within the ranges that the project names."""
    for requirement in _requirements():
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        check, remedy = f"package {requirement.name}", f"pip install '{requirement}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(check, "problem", "is not installed", remedy)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(check, "ok", version)
        else:
            said = f"{version} is installed, the range is {requirement.specifier}"
            yield Finding(check, "warning", said, remedy)


def _requirements() -> list[Requirement]:
    """What the package needs, from its metadata or from the checkout that it lies in."""
    if _PROJECT.is_file():
        texts = tomllib.loads(_PROJECT.read_text())["project"]["dependencies"]
    else:
        texts = [t for t in importlib.metadata.requires("relora_ds") or () if "extra ==" not in t]
    return [Requirement(text) for text in texts]
