"""Trackio and MLflow get what a run reports, go on after a resume, and never stop a run."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relora_ds.config.schema import RunConfig
from relora_ds.errors import ConfigError
from relora_ds.train.telemetry.telemetry import Telemetry

MakeConfig = Callable[..., RunConfig]


class Recorder:
    """Stands for a package: notes every call by its name."""

    def __init__(self, found: list[Any] | None = None) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.found = found or []
        self.__spec__ = importlib.util.spec_from_loader("package", None)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, arguments, named))
            return self.found

        return call

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(arguments, named) for called, arguments, named in self.calls if called == name]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorder]:
    def put(name: str, **how: Any) -> Recorder:
        recorder = Recorder(**how)
        monkeypatch.setitem(sys.modules, name, recorder)
        return recorder

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return put


def report(config: RunConfig, output_dir: Path, resume_step: int = 0) -> None:
    telemetry = Telemetry(config, output_dir, total_steps=100, resume_step=resume_step)
    telemetry.log(7, {"train/loss": 2.5, "eval/loss": None, "method/event": "merge"})
    telemetry.close("preempted")


def test_trackio_gets_what_is_known(
    tmp_path: Path, make_config: MakeConfig, packages: Callable[..., Recorder]
) -> None:
    trackio = packages("trackio")
    report(make_config(trackio="mine", wandb={"project": "x"}), tmp_path / "a")
    (_, began), (logged, at) = *trackio.of("init"), trackio.of("log")[0]
    assert (began["project"], began["name"], began["resume"]) == ("mine", "a", "never")
    assert began["config"]["train"]["steps"] == 100
    assert logged == ({"train/loss": 2.5, "method/event": "merge"},)
    assert at == {"step": 7}
    assert trackio.of("finish") == [((), {})]
    report(make_config(trackio="mine"), tmp_path / "a", resume_step=5)
    assert trackio.of("init")[1][1]["resume"] == "allow"


def test_mlflow_gets_numbers_settings_and_the_end(
    tmp_path: Path, make_config: MakeConfig, packages: Callable[..., Recorder]
) -> None:
    mlflow = packages("mlflow")
    report(make_config(mlflow="mine"), tmp_path / "a")
    assert mlflow.of("set_experiment") == [(("mine",), {})]
    (_, began), (logged, how) = mlflow.of("start_run")[0], mlflow.of("log_metrics")[0]
    assert (began["run_id"], began["run_name"]) == (None, "a")
    assert logged == ({"train/loss": 2.5},)
    assert how == {"step": 7, "synchronous": False}
    settings = {k: v for (part,), _ in mlflow.of("log_params") for k, v in part.items()}
    assert settings["train.steps"] == "100"
    assert all(len(part) <= 100 for (part,), _ in mlflow.of("log_params"))
    assert mlflow.of("end_run") == [((), {"status": "KILLED"})]


def test_a_resumed_run_goes_on_under_its_id_at_mlflow(
    tmp_path: Path, make_config: MakeConfig, packages: Callable[..., Recorder]
) -> None:
    earlier = SimpleNamespace(info=SimpleNamespace(run_id="abc"))
    mlflow = packages("mlflow", found=[earlier])
    report(make_config(mlflow="mine"), tmp_path / "it's", resume_step=5)
    (_, began), (_, asked) = mlflow.of("start_run")[0], mlflow.of("search_runs")[0]
    assert began["run_id"] == "abc"
    assert asked["filter_string"].count("'") == 2, "a path may hold what would end its text"
    name, _, key = asked["filter_string"].removeprefix("tags.`").partition("` = ")
    assert began["tags"][name] == key.strip("'")
    assert mlflow.of("log_params") == []  # they are there


@pytest.mark.parametrize(("key", "package"), [("trackio", "trackio"), ("mlflow", "mlflow-skinny")])
@pytest.mark.parametrize("is_main", [True, False])
def test_a_missing_package_is_one_sentence_on_every_rank(
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    package: str,
    is_main: bool,
) -> None:
    monkeypatch.setitem(sys.modules, key, None)
    with pytest.raises(ConfigError, match=f"log.{key} needs .*run `pip install {package}`"):
        Telemetry(make_config(**{key: "mine"}), tmp_path, total_steps=9, is_main=is_main)


def test_one_that_cannot_start_leaves_the_run_alone(
    tmp_path: Path,
    make_config: MakeConfig,
    packages: Callable[..., Recorder],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no server")

    monkeypatch.setattr(packages("mlflow"), "set_experiment", refuse, raising=False)
    with caplog.at_level(logging.WARNING):
        report(make_config(mlflow="mine"), tmp_path / "a")
    assert "mlflow cannot start (RuntimeError: no server)" in caplog.text
    assert (tmp_path / "a" / "metrics.jsonl").read_text().count("train/loss") == 1
