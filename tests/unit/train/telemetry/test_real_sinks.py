"""Trackio and MLflow as they are: what a run and its resumption report can be read back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from relora_ds.config.schema import RunConfig
from relora_ds.train.telemetry.telemetry import Telemetry

MakeConfig = Callable[..., RunConfig]
pytestmark = pytest.mark.slow


def report(config: RunConfig, output_dir: Path, first: int, resumed: bool) -> None:
    """Three steps of a run, of which the last one says more."""
    step = first - 1 if resumed else 0
    telemetry = Telemetry(config, output_dir, total_steps=100, resume_step=step)
    for step in range(first, first + 3):
        telemetry.log(step, {"train/loss": 5.0 / step, "data/tokens/c4 en": 10 * step})
    last = {"eval/loss": None, "eval/perplexity": 44.5, "method/event": "merge"}
    telemetry.log(first + 3, {"train/loss": 0.5, **last})
    telemetry.close("preempted" if not resumed else "completed")


# characters that mean something in a filter, a path or a table
NAMES = ["mine", "it's", 'a "b" (c)', "50% ü"]


@pytest.mark.parametrize("name", NAMES)
def test_mlflow(
    name: str, tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    config, output_dir = make_config(mlflow="experiment"), tmp_path / name
    report(config, output_dir, 1, resumed=False)
    report(config, output_dir, 5, resumed=True)
    report(config, tmp_path / "another", 1, resumed=False)

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("experiment")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {name, "another"}
    run = runs[name]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "100"
    assert run.data.metrics["eval/perplexity"] == 44.5
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [each.step for each in losses] == [*range(1, 9)]
    assert losses[4].value == 1.0
    tokens = client.get_metric_history(run.info.run_id, "data/tokens/c4 en")
    assert [each.value for each in tokens] == [10, 20, 30, 50, 60, 70]


@pytest.mark.parametrize("name", NAMES)
def test_trackio(
    name: str, tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in [each for each in sys.modules if each.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it reads the variable when it is imported
    trackio = pytest.importorskip("trackio")
    config, output_dir = make_config(trackio="project"), tmp_path / name
    report(config, output_dir, 1, resumed=False)
    report(config, output_dir, 5, resumed=True)
    (run,) = trackio.Api().runs("project")
    assert run.name == name
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    assert storage.get_run_config("project", name)["train"]["steps"] == 100
    logs = storage.get_logs("project", name)
    losses = {each["step"]: each["train/loss"] for each in logs if "train/loss" in each}
    assert list(losses) == [*range(1, 9)]
    assert (losses[4], losses[5]) == (0.5, 1.0)
    assert [each["method/event"] for each in logs if "method/event" in each] == ["merge"] * 2
