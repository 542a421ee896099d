"""The one object through which the training loop reports."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from relora_ds.config.schema import RunConfig
from relora_ds.extras import check_installed
from relora_ds.train.telemetry.sinks import mlflow, trackio
from relora_ds.train.telemetry.sinks.base import Metrics, MetricsFile, Sink, Status
from relora_ds.train.telemetry.sinks.console import build_console
from relora_ds.train.telemetry.sinks.tensorboard import TensorBoardSink, require_tensorboard
from relora_ds.train.telemetry.sinks.wandb import WandbSink, effective_mode

_logger = logging.getLogger(__name__)


class Telemetry:
    """Passes every report to all sinks of the run; on ranks other than the main one to none.

    metrics.jsonl is part of the result, so its failure is an error. Every other sink is a comfort:
    one that fails is warned about once and dropped.

    Args:
        config: the run description.
        output_dir: directory of the run.
        total_steps: optimizer steps of the whole run.
        resume_step: optimizer step of the checkpoint that the run continues from, 0 for none.
        wandb_run_id: what `state_dict` returned when that checkpoint was saved.
        is_main: whether this process reports; exactly one does.

    Raises:
        ConfigError: on every rank, a package that the configuration needs is missing; on the main
            one, `output_dir` cannot be written.
    """

    def __init__(
        self,
        config: RunConfig,
        output_dir: Path,
        *,
        total_steps: int,
        resume_step: int = 0,
        wandb_run_id: str | None = None,
        is_main: bool = True,
    ) -> None:
        self._wandb_run_id = wandb_run_id
        self._metrics_file: MetricsFile | None = None
        self._optional: dict[str, Sink] = {}
        if config.log.tensorboard:
            require_tensorboard()
        if config.log.trackio is not None:
            check_installed(trackio.PACKAGE, trackio.PACKAGE, "log.trackio")
        if config.log.mlflow is not None:
            check_installed(mlflow.MODULE, mlflow.PACKAGE, "log.mlflow")
        if not is_main:
            return
        self._metrics_file = MetricsFile(output_dir / "metrics.jsonl", resume_step)
        if config.log.tensorboard:
            self._optional["tensorboard"] = TensorBoardSink(output_dir / "tensorboard", resume_step)
        if effective_mode(config.log.wandb.mode) != "disabled":
            sink = WandbSink(
                config.log.wandb,
                output_dir,
                config.model_dump(mode="json"),
                default_name=output_dir.resolve().name,
                run_id=wandb_run_id,
            )
            self._wandb_run_id = sink.run_id
            self._optional["wandb"] = sink
        settings = config.model_dump(mode="json"), resume_step > 0
        if (project := config.log.trackio) is not None:
            name = output_dir.resolve().name
            self._begin("trackio", lambda: trackio.TrackioSink(project, name, *settings))
        if (experiment := config.log.mlflow) is not None:
            self._begin("mlflow", lambda: mlflow.MlflowSink(experiment, output_dir, *settings))
        # Last: the messages of the sinks above are to stand before a live bar.
        self._optional["console"] = build_console(total_steps, resume_step)

    def _begin(self, name: str, build: Callable[[], Sink]) -> None:
        """Add a sink, or warn that the run goes on without it."""
        try:
            self._optional[name] = build()
        except Exception as error:  # a display must never stop the run it shows
            _logger.warning("%s cannot start (%s: %s)", name, type(error).__name__, error)

    def log(self, step: int, metrics: Metrics) -> None:
        """Report the figures of `step`, the number of completed updates. Steps never decrease.

        Every call makes one line of metrics.jsonl: gather what belongs to a step in one call.

        Raises:
            ReloraError: metrics.jsonl cannot be written.
        """
        if self._metrics_file is None:
            return
        self._metrics_file.log(step, metrics)
        self._for_each(lambda sink: sink.log(step, metrics))

    def event(self, step: int, text: str, metrics: Metrics | None = None) -> None:
        """Announce what happened after `step` to the person who watches, and report its figures.

        Args:
            step: number of completed updates.
            text: one line, such as ``checkpoint saved to runs/a/checkpoints/step_500``.
            metrics: figures of the event, reported as by `log`; none makes no line.

        Raises:
            ReloraError: metrics.jsonl cannot be written.
        """
        if self._metrics_file is None:
            return
        _logger.info("step %s: %s", f"{step:,}", text)
        if metrics:
            self.log(step, metrics)

    def rewind(self, step: int) -> None:
        """Forget the figures of later steps: the run goes back to a checkpoint of `step` updates.

        Displays go on from where they are.

        Raises:
            ReloraError: metrics.jsonl cannot be written.
        """
        if self._metrics_file is not None:
            self._metrics_file.rewind(step)

    def close(self, status: Status) -> None:
        """Finish all sinks; reports after it are an error. Further calls do nothing.

        Raises:
            ReloraError: the end of metrics.jsonl cannot be written.
        """
        self._for_each(lambda sink: sink.close(status))
        self._optional.clear()
        if self._metrics_file is not None:
            self._metrics_file.close(status)

    def state_dict(self) -> dict[str, str | None]:
        """What a checkpoint must hold for a resumed run to continue the same curves."""
        return {"wandb_run_id": self._wandb_run_id}

    def _for_each(self, action: Callable[[Sink], None]) -> None:
        """Run `action` on the optional sinks and drop those that fail."""
        for name, sink in list(self._optional.items()):
            try:
                action(sink)
            except Exception as error:  # a display must never end the run it shows
                del self._optional[name]
                _logger.warning(
                    "%s failed and is switched off (%s: %s)", name, type(error).__name__, error
                )
