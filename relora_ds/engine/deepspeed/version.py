"""The version of DeepSpeed whose keys, wrappers, layouts and files this package knows."""

from __future__ import annotations

from importlib.metadata import version

SUPPORTED = "0.19.8"


def version_advice() -> str | None:
    """What to say about another version than the one that is known; None if it is that one."""
    installed = version("deepspeed").partition("+")[0]  # a build of one's own adds a local part
    if installed == SUPPORTED:
        return None
    return (
        f"DeepSpeed {installed} is installed, but this trainer was tested with {SUPPORTED} and "
        "reads its private parts: a layout that moved is an error at the start, counted bytes may "
        f"differ from their closed form; install deepspeed=={SUPPORTED} if anything is odd"
    )
