"""What a check found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """Name of the check."""
    status: Status
    """`problem`: runs will fail; `warning`: some will, or slowly; `note`: nothing to be done."""
    said: str
    """What was found."""
    remedy: str = ""
    """What to do; never empty for a warning or a problem."""

    def __post_init__(self) -> None:
        assert self.remedy or self.status in ("ok", "note"), "a finding without a way out"

    def as_dict(self) -> dict[str, str]:
        """By field, for a program."""
        return asdict(self)
