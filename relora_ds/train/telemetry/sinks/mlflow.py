"""MLflow: metrics on a tracking server, or in files where none is named. The package is optional.

The server is that of `MLFLOW_TRACKING_URI`. Waiting for it is bounded, and figures are sent in the
background.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relora_ds.config.free import flat_settings
from relora_ds.extras import require
from relora_ds.redaction import redact
from relora_ds.train.telemetry.sinks.base import Metrics, Status

MODULE, PACKAGE = "mlflow", "mlflow-skinny"
_TAG = "relora_ds.output_dir"
_KEY = "relora_ds.output_dir_sha256"  # a filter cannot name a path with quotes in it
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
_LONGEST = 500  # characters of a value that every server takes
_AT_ONCE = 100  # settings that a server takes in one request


class MlflowSink:
    """One run of an experiment; a resumed run goes on under the same id.

    Args:
        experiment: what runs are listed under.
        output_dir: directory of the run, by which an earlier part of it is found.
        run_config: resolved configuration to show; credentials in it are redacted.
        is_resumed: whether an earlier process has begun the run.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(
        self, experiment: str, output_dir: Path, run_config: Mapping[str, Any], is_resumed: bool
    ) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        self._mlflow = require(MODULE, PACKAGE, "log.mlflow")
        self._mlflow.set_experiment(experiment)
        place = str(output_dir.resolve())
        key = hashlib.sha256(os.fsencode(place)).hexdigest()
        earlier = self._earlier(experiment, key) if is_resumed else None
        name, tags = output_dir.resolve().name, {_TAG: place, _KEY: key}
        self._mlflow.start_run(run_id=earlier, run_name=None if earlier else name, tags=tags)
        if earlier is None:
            self._show(redact(run_config))

    def log(self, step: int, metrics: Metrics) -> None:
        """Record every number that is known; text is no metric there."""
        numbers = {name: float(v) for name, v in metrics.items() if isinstance(v, int | float)}
        if numbers:
            self._mlflow.log_metrics(numbers, step=step, synchronous=False)

    def close(self, status: Status = "completed") -> None:
        """Send what is pending and end the run: finished, killed or failed."""
        known = {"completed": "FINISHED", "preempted": "KILLED"}
        self._mlflow.end_run(status=known.get(status, "FAILED"))

    def _earlier(self, experiment: str, key: str) -> str | None:
        """Id of the newest run of the directory with this hash."""
        found = self._mlflow.search_runs(
            experiment_names=[experiment],
            filter_string=f"tags.`{_KEY}` = '{key}'",
            max_results=1,
            output_format="list",
        )
        return found[0].info.run_id if found else None

    def _show(self, run_config: Mapping[str, Any]) -> None:
        """Put the settings beside the metrics."""
        settings = [(key, str(v)[:_LONGEST]) for key, v in flat_settings(run_config)]
        for first in range(0, len(settings), _AT_ONCE):
            self._mlflow.log_params(dict(settings[first : first + _AT_ONCE]))
