"""Log files of every rank, and the readable log of rank 0."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from relora_ds.errors import ConfigError
from relora_ds.files.regular import open_own
from relora_ds.redaction import mask_values, secret_values

_FILE_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"
_HANDLER_PREFIX = "relora_ds."

# Libraries whose INFO is noise in a training log, and those whose higher levels are noise as well:
# megatron warns at import about each optional kernel library that it does not find, and wandb logs
# a traceback of each failure that it also raises.
_QUIETED = {
    logging.WARNING: (
        "asyncio",
        "datasets",
        "filelock",
        "fsspec",
        "h5py",
        "matplotlib",
        "numexpr",
        "PIL",
        "pyarrow",
        "tensorboard",
        "torch",
        "transformers",
        "urllib3",
    ),
    # deepspeed warns that it has not tested our optimizer; our tests have
    logging.ERROR: ("DeepSpeed", "megatron"),
    logging.CRITICAL: ("wandb",),
}


def configure_logging(output_dir: Path, rank: int) -> None:
    """Send what this process logs to ``logs/rank_R.log``, and on rank 0 also to stderr.

    Files are appended to, so that a resumed run keeps its history. Python's warnings are logged
    too. Values of credentials in the environment are masked. May be called again, also with
    another directory: earlier handlers of this function are replaced. Call it after importing
    deepspeed, whose logger installs a handler of its own on import.

    Args:
        output_dir: directory of the run.
        rank: global rank of this process.

    Raises:
        ConfigError: the log file cannot be written.
    """
    secrets = secret_values(os.environ)
    path = output_dir / "logs" / f"rank_{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers: list[logging.Handler] = [_LogFile(path, encoding="utf-8")]
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; choose an output_dir that can be written"
        ) from error
    handlers[0].setFormatter(_MaskingFormatter(_FILE_FORMAT, "%Y-%m-%dT%H:%M:%S", secrets))
    if rank == 0:
        handlers.append(_StderrHandler())
        handlers[1].setFormatter(_ShortFormatter("%(message)s", "%H:%M:%S", secrets))

    _replace_handlers(handlers)
    _quiet_libraries()
    logging.captureWarnings(True)


class _LogFile(logging.FileHandler):
    """A log at its own place: written through no link, and into no pipe that nobody reads.

    What cannot be written, as on a full disk, is said once, and ends nothing.
    """

    _told = False

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, opener=open_own)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            sys.stderr.write(
                f"cannot write {self.baseFilename}: {error.strerror}; lines of it are lost\n"
            )

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what could not be written before
            super().close()


def _replace_handlers(handlers: Sequence[logging.Handler]) -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        if (handler.name or "").startswith(_HANDLER_PREFIX):
            root.removeHandler(handler)
            handler.close()
    for handler in handlers:
        handler.set_name(_HANDLER_PREFIX + type(handler).__name__)
        root.addHandler(handler)
    root.setLevel(logging.INFO)


def _quiet_libraries() -> None:
    for level, names in _QUIETED.items():
        for name in names:
            logging.getLogger(name).setLevel(level)
    # DeepSpeed prints to stdout and keeps its messages from the root logger. Every rank would
    # interleave there, and nothing would reach the log files.
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.handlers.clear()
    deepspeed.propagate = True


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the time of the message.

    A live progress bar replaces `sys.stderr` by a proxy that prints above the bar; a handler that
    holds on to the stream of its creation would write through the bar.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr


class _MaskingFormatter(logging.Formatter):
    """Masks credentials in the finished text, tracebacks included."""

    def __init__(self, form: str, time_form: str, secrets: Sequence[str]) -> None:
        super().__init__(form, time_form)
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        return mask_values(super().format(record), self._secrets)


class _ShortFormatter(_MaskingFormatter):
    """Time and message; the level only where it is worth a look."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname} " if record.levelno > logging.INFO else ""
        return f"{self.formatTime(record, self.datefmt)} {level}{super().format(record)}"
