"""Why a checkpoint could not be saved, in words that name the file and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relora_ds.files.durable import describe, is_out_of_space, remedy


@dataclass(frozen=True)
class Problem:
    """What went wrong on one rank.

    Args:
        rank: where.
        what: the file and the reason.
        remedy: what a user can do about it.
        no_space: whether more space is the remedy.
    """

    rank: int
    what: str
    remedy: str
    no_space: bool = False

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Problem:
        """What an exception tells."""
        if isinstance(error, OSError):
            return cls(rank, describe(error), remedy(error), is_out_of_space(error))
        if isinstance(error, MemoryError):
            advice = "set checkpoint.asynchronous to false, which needs no copy in host memory"
            return cls(rank, "not enough host memory", advice)
        return cls(rank, f"{type(error).__name__}: {error}", "report this as an error of relora_ds")


def explain(
    step: int, problems: Sequence[Problem], needed: int, free: int | None, older: Path | None
) -> str:
    """One line for all ranks.

    Args:
        step: of the checkpoint that was not saved.
        problems: at least one.
        needed: bytes of the checkpoint; 0 if it failed before they were counted.
        free: bytes that are free where it was to be; None if nobody knows.
        older: the newest complete checkpoint.
    """
    first = problems[0]
    advice = first.remedy
    if first.no_space:
        # a quota may be full, and files take more than their tensors
        takes = f"the checkpoint takes about {size(needed)}" if needed else "the disk is full"
        advised = ": free some space there, raise the quota"
        if free is not None and free < needed:
            advised = f" and {size(free)} are free: free the difference"
        advice = f"{takes}{advised}, or keep fewer with checkpoint.keep"
    left = "there is no complete checkpoint yet" if older is None else f"{older} is complete"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return (
        f"no checkpoint of step {step} was saved: rank {first.rank}: {first.what}{more}; {advice}; "
        f"{left}"
    )


def size(count: int) -> str:
    """Bytes for a reader, as "1.4 GB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
