"""wandb for real: offline, and online with no login, no server, and a server that hangs.

No test reaches a network beyond this host.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relora_ds.config.sections import WandbConfig
from relora_ds.train.telemetry.sinks.wandb import WandbSink, effective_mode

wandb = pytest.importorskip("wandb")

CANARY = "c0ffee" * 6 + "abcd"  # 40 characters, the length of a wandb key


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No login from the environment or the home directory, and a fresh wandb service."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (tmp_path / "home").mkdir()
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """Address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def _sink(mode: Any, directory: Path, run_id: str | None = None, **run_config: Any) -> WandbSink:
    """A sink that does not wait for a server, and that gives the disk all the time it needs."""
    config = WandbConfig(mode=mode, project="test")
    return WandbSink(
        config,
        directory,
        run_config,
        default_name="name",
        run_id=run_id,
        init_timeout_s=0.5,
        finish_timeout_s=0.2 if mode == "online" else 30.0,
    )


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the product warned of; wandb has words of its own."""
    own = [record for record in caplog.records if record.name.startswith("relora_ds")]
    return [record.getMessage() for record in own if record.levelno >= logging.WARNING]


def test_offline_records_below_the_output_directory_without_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    sink = _sink("offline", tmp_path / "run", api_key=CANARY, data={"tokenizer": "a.model"})
    assert sink.mode == "offline"
    assert sink._run is not None
    assert sink._run.config["data"] == {"tokenizer": "a.model"}
    sink.log(10, {"train/loss": 3.5, "method/event": "merge", "throughput/mfu": None})
    sink.log(20, {"train/loss": float("nan")})
    sink.close("preempted")
    sink.close("preempted")
    wandb.teardown()  # its process may still be writing when the run is finished
    recorded = list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{sink.run_id}.wandb"))
    assert len(recorded) == 1
    content = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
    assert b"train/loss" in content
    assert b"throughput/mfu" not in content
    assert CANARY.encode() not in content
    assert CANARY not in caplog.text


def test_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _sink("offline", tmp_path)
    first.close()
    second = _sink("offline", tmp_path, run_id=first.run_id)
    assert second._run is not None
    assert second.run_id == second._run.id == first.run_id
    second.close()
    monkeypatch.setenv("WANDB_RUN_ID", "fromenv1")
    third = _sink("offline", tmp_path)
    assert third.run_id == "fromenv1"
    third.close()


@pytest.mark.slow
@pytest.mark.parametrize("login", [False, True], ids=["no_login", "no_server"])
def test_online_falls_back_to_offline_within_seconds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    login: bool,
) -> None:
    if login:
        monkeypatch.setenv("WANDB_API_KEY", CANARY)
    started = time.monotonic()
    sink = _sink("online", tmp_path, run_id="kept1234")
    assert sink.mode == "offline"
    sink.log(1, {"train/loss": 1.0})
    sink.close()
    assert time.monotonic() - started < 60
    assert sink.run_id == "kept1234"
    assert len(_warnings(caplog)) == 1
    assert "recording offline" in _warnings(caplog)[0]


@pytest.mark.slow
def test_a_server_that_hangs_holds_nothing_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hanging_server: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("WANDB_BASE_URL", hanging_server)
    started = time.monotonic()
    sink = _sink("online", tmp_path)
    assert sink.mode == "offline"
    sink.close()
    assert time.monotonic() - started < 60
    assert len(_warnings(caplog)) == 1


def test_a_missing_login_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("training must not wait for a person")

    monkeypatch.setattr("wandb.util.prompt_choices", fail)
    monkeypatch.setattr("wandb.errors.term._sys_stdin_isatty", lambda: True)
    monkeypatch.setattr("wandb.errors.term._sys_stderr_isatty", lambda: True)
    sink = _sink("online", tmp_path)
    assert sink.mode == "offline"
    sink.close()


def test_where_nothing_works_the_run_is_not_mirrored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**kwargs: Any) -> None:
        raise RuntimeError("broken\nwith details")

    monkeypatch.setattr(wandb, "init", fail)
    sink = _sink("online", tmp_path, run_id="kept1234")
    sink.log(1, {"train/loss": 1.0})
    sink.close()
    assert (sink.mode, sink.run_id) == ("disabled", "kept1234")
    assert [("offline" in w, "not mirrored" in w) for w in _warnings(caplog)] == [
        (True, False),
        (False, True),
    ]
    assert "with details" not in caplog.text


def test_a_missing_package_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert _sink("offline", tmp_path).mode == "disabled"
    assert len(_warnings(caplog)) == 1


@pytest.mark.parametrize(
    ("configured", "variable", "effective"),
    [
        ("online", None, "online"),
        ("online", "offline", "offline"),
        ("online", "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("online", "nonsense", "online"),
    ],
)
def test_the_environment_can_only_lower_the_mode(
    monkeypatch: pytest.MonkeyPatch, configured: Any, variable: str | None, effective: str
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert effective_mode(configured) == effective
