"""Weights & Biases: a mirror of the metrics that must never hold up the run it shows.

Every wait for the server is bounded: starting by `init_timeout_s`, uploading at the end by
`finish_timeout_s`; in between a background process of wandb's does the talking. A run that cannot
start online is recorded on disk, one that cannot be recorded at all is not mirrored.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from relora_ds.config.sections import WandbConfig
from relora_ds.redaction import mask_urls, redact
from relora_ds.train.telemetry.sinks.base import Metrics, Status

Mode = Literal["disabled", "offline", "online"]

_logger = logging.getLogger(__name__)
_MODES: tuple[Mode, ...] = ("disabled", "offline", "online")  # from least to most access


def effective_mode(configured: Mode) -> Mode:
    """The configured mode, or that of the variable ``WANDB_MODE`` where it allows less.

    Sites without a route to the internet set the variable for everybody. It never turns on what
    the run description turned off.
    """
    allowed = os.environ.get("WANDB_MODE")
    return next(mode for mode in _MODES if configured == mode or allowed == mode)


class WandbSink:
    """One wandb run, continued under the same id when training resumes.

    Args:
        config: mode (not ``disabled``), project and run name.
        directory: parent of the ``wandb`` directory that the run is recorded in.
        run_config: resolved configuration to show; credentials in it, as in names, are redacted.
        default_name: run name where the configuration gives none.
        run_id: id of the run to continue. Default: ``WANDB_RUN_ID``, or a new one.
        init_timeout_s: longest wait for the server at the start, in seconds.
        finish_timeout_s: longest wait for the upload at the end, in seconds.
    """

    def __init__(
        self,
        config: WandbConfig,
        directory: Path,
        run_config: Mapping[str, Any],
        *,
        default_name: str,
        run_id: str | None = None,
        init_timeout_s: float = 10.0,
        finish_timeout_s: float = 30.0,
    ) -> None:
        self._config = config
        self._directory = directory
        self._name = mask_urls(config.name or default_name)
        self._init_timeout_s = init_timeout_s
        self._finish_timeout_s = finish_timeout_s
        # Chosen here and not by wandb, so that a fallback keeps it.
        self._run_id = run_id or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
        self._run = self._start(redact(run_config))

    @property
    def run_id(self) -> str:
        """Id to store in checkpoints and to pass in again on resume."""
        return self._run_id

    @property
    def mode(self) -> Mode:
        """What the run came to: ``online``, ``offline``, or ``disabled`` where nothing worked."""
        if self._run is None:
            return "disabled"
        return "offline" if self._run.offline else "online"

    def log(self, step: int, metrics: Metrics) -> None:
        """Record every value that is known.

        wandb ignores a step below one that it has seen. A resumed run repeats its steps exactly,
        so that this leaves one clean curve.
        """
        if self._run is not None:
            known = {name: value for name, value in metrics.items() if value is not None}
            self._run.log(known, step=step)

    def close(self, status: Status = "completed") -> None:
        """Finish the run: as finished when completed, as preempted or failed otherwise."""
        run, self._run = self._run, None
        if run is None:
            return
        if status == "preempted":
            run.mark_preempting()
        run.finish(exit_code=0 if status == "completed" else 1)

    def _start(self, run_config: Mapping[str, Any]) -> Any:
        """The wandb run in the best mode that works, or None."""
        mode = effective_mode(self._config.mode)
        if mode == "online":
            try:
                run = self._init("online", run_config)
            except Exception as error:  # whatever it is, training matters more
                _logger.warning("wandb cannot start online (%s); recording offline", _line(error))
            else:
                _logger.info("wandb shows this run at %s", run.url)
                return run
        try:
            run = self._init("offline", run_config)
        except Exception as error:
            _logger.warning("wandb cannot start (%s); the run is not mirrored", _line(error))
            return None
        _logger.info("wandb records offline; upload with `wandb sync %s`", Path(run.dir).parent)
        return run

    def _init(self, mode: Mode, run_config: Mapping[str, Any]) -> Any:
        # wandb reports its own errors to the server, and waits up to half a minute for that when
        # the process exits: with a server that hangs, that is the error to report.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        # A run that failed to start keeps its id reserved in wandb's background process.
        wandb.teardown()
        # Silent from the start: otherwise a missing login asks for a key on a terminal and waits.
        wandb.setup(settings=wandb.Settings(silent=True))
        self._directory.mkdir(parents=True, exist_ok=True)
        with _masked_arguments():
            return wandb.init(
                mode=mode,
                project=mask_urls(self._config.project),
                name=self._name,
                id=self._run_id,
                resume="allow",
                dir=str(self._directory),
                config=dict(run_config),
                settings=wandb.Settings(
                    console="off",  # our stderr carries a live progress bar
                    disable_git=True,  # the working tree's diff is uploaded otherwise
                    save_code=False,
                    init_timeout=self._init_timeout_s,
                    finish_timeout=self._finish_timeout_s,
                ),
            )


@contextmanager
def _masked_arguments() -> Iterator[None]:
    """Within it the command line has no credential that a URL held: wandb records it."""
    arguments = sys.argv
    sys.argv = [mask_urls(argument) for argument in arguments]
    try:
        yield
    finally:
        sys.argv = arguments


def _line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines and lines[0] != "<no message>" else type(error).__name__
