"""Trackio: metrics in a local database that its dashboard shows. The package is optional."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relora_ds.extras import require
from relora_ds.redaction import redact
from relora_ds.train.telemetry.sinks.base import Metrics, Status

PACKAGE = "trackio"


class TrackioSink:
    """One run of a project; a resumed run goes on under the same name.

    Args:
        project: what runs are listed under.
        name: of the run.
        run_config: resolved configuration to show; credentials in it are redacted.
        is_resumed: whether an earlier process has begun the run.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(
        self, project: str, name: str, run_config: Mapping[str, Any], is_resumed: bool
    ) -> None:
        self._trackio = require(PACKAGE, PACKAGE, "log.trackio")
        resume = "allow" if is_resumed else "never"
        config = redact(run_config)
        self._trackio.init(project=project, name=name, config=config, resume=resume)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record every value that is known."""
        known = {name: value for name, value in metrics.items() if value is not None}
        self._trackio.log(known, step=step)

    def close(self, status: Status = "completed") -> None:
        """Write out what is pending. `status` is not recorded here."""
        self._trackio.finish()
