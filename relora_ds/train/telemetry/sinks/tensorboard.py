"""TensorBoard event files. The package is optional and imported only when it is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from relora_ds.errors import ConfigError
from relora_ds.train.telemetry.sinks.base import Metrics, Status


def require_tensorboard() -> None:
    """Check that event files can be written, without the cost of importing anything.

    Raises:
        ConfigError: the package is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "log.tensorboard is true, but the package tensorboard is not installed; "
            "run `pip install tensorboard` or set log.tensorboard=false"
        )


class TensorBoardSink:
    """Writes scalars, and text for values such as the name of an event.

    Args:
        directory: where the event files go.
        resume_step: optimizer step the run continues from; TensorBoard hides what an earlier part
            of the run logged after it. 0 hides everything.

    Raises:
        ConfigError: the package is not installed, or does not work.
    """

    def __init__(self, directory: Path, resume_step: int = 0) -> None:
        require_tensorboard()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"log.tensorboard is true, but the package tensorboard does not work ({error}); "
                "reinstall it or set log.tensorboard=false"
            ) from error

        purge_step = resume_step + 1 if resume_step > 0 else 0
        self._writer = SummaryWriter(log_dir=str(directory), purge_step=purge_step)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record every value that is known."""
        for name, value in metrics.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, global_step=step)
            elif value is not None:
                self._writer.add_scalar(name, value, global_step=step)

    def close(self, status: Status = "completed") -> None:
        """Flush and close the event file. `status` is not recorded here."""
        self._writer.close()
