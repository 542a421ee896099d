"""What a case is: a function of a device and of sizes that returns figures, or raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Status = Literal["PASS", "FAIL", "SKIP"]
Figures = dict[str, Any]
"""What a case found, ready for JSON."""


class CaseSkippedError(Exception):
    """The device or the installation lacks what the case is about."""


@dataclass(frozen=True)
class Sizes:
    """How much a case computes.

    Args:
        tiny: small enough for a CPU; all code runs, no figure means anything.
    """

    tiny: bool

    def pick(self, tiny: Any, full: Any) -> Any:
        """The first for tiny runs, the second for a GPU."""
        return tiny if self.tiny else full


@dataclass(frozen=True)
class Case:
    """One line of the report. Pickled on its way to the process that runs it.

    Args:
        stage: its letter.
        name: unique within the stage.
        function: called as `function(device, sizes, **arguments)` on every rank. An exception is a
            failure; of several ranks, the first one's figures are reported.
        arguments: for the function; what pickle takes.
        expected_s: seconds on a GPU, by which cases are ordered and budgets spent.
        value: information that it brings, in any unit; the most valuable second comes first.
        limit_s: seconds after which it is killed.
        ranks: processes, which share one device; 0 for a function that starts its own.
        alone: no other case may run beside it.
        environment: variables of its processes.
    """

    stage: str
    name: str
    function: Callable[..., Figures]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    expected_s: float = 5.0
    value: float = 5.0
    limit_s: float = 60.0
    ranks: int = 1
    alone: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Stage and name, as printed."""
        return f"{self.stage}/{self.name}"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def require_cuda(device: torch.device, what: str) -> None:
    """Skip a case about something that only GPUs have."""
    if device.type != "cuda":
        raise CaseSkippedError(f"{what} needs a GPU")
