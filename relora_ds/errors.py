"""The errors that a user can cause, each with the exit code that scripts rely on.

A message states what was wrong (with the value), the rule, and the remedy. `assert` is kept for
invariants of our own; everything a user or a machine can get wrong is one of these classes.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 50


class ReloraError(ValueError):
    """Base of every error that is reported to the user as one line instead of a traceback."""

    exit_code = 1


class ConfigError(ReloraError):
    """The run description or the command line is wrong. Carries every problem found, not the first.

    Args:
        problems: one message, or several that are shown one per line.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.shown))

    @property
    def shown(self) -> list[str]:
        """The problems as a user is told them: the first ones, and how many there are beyond."""
        beyond = len(self.problems) - _SHOWN
        more = [f"and {beyond:,} more problems"] if beyond > 0 else []
        return [*self.problems[:_SHOWN], *more]


class DataError(ReloraError):
    """A corpus, token file or tokenizer cannot be used."""

    exit_code = 3


class CheckpointError(ReloraError):
    """A checkpoint is missing, incomplete, altered, or does not belong to this run."""

    exit_code = 4


class DivergenceError(ReloraError):
    """Loss, gradient, weights or an event are not to be believed; nothing of it was saved."""

    exit_code = 5


class DesyncError(ReloraError):
    """Replicas that must hold identical values do not."""

    exit_code = 6


class CollectiveTimeoutError(ReloraError):
    """A collective did not finish within the configured time, or a process in it was lost."""

    exit_code = 7


class PreemptedError(ReloraError):
    """The run was asked to stop, saved what there was to save, and can be requeued."""

    exit_code = 75
