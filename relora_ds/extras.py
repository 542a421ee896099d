"""Optional packages: one sentence with the command that installs what is missing."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from relora_ds.errors import ConfigError


def require(module: str, package: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: what is imported.
        package: what `pip` calls it.
        purpose: the option or command that needs it.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        root = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == root
        problem = "" if missing else f", which cannot be imported ({error})"
        raise ConfigError(
            f"{purpose} needs the package {package}{problem}: run `pip install {package}`"
        ) from error


def check_installed(module: str, package: str, purpose: str) -> None:
    """Check that an optional package is there, without the cost of importing it.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec(module) is None:
        raise ConfigError(f"{purpose} needs the package {package}: run `pip install {package}`")
