"""Log files per rank, the short log of rank 0, quiet libraries, masked credentials."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from relora_ds.errors import ConfigError
from relora_ds.train.telemetry.logs import configure_logging

CANARY = "canary-0123456789"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Leaves the process's logging as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_rank_0_writes_its_file_and_short_lines_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(tmp_path, 0)
    logging.getLogger("relora_ds.train").info("loss %.1f", 3.5)
    logging.getLogger("relora_ds.train").warning("careful")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d loss 3\.5", lines[0])
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING careful", lines[1])
    text = (tmp_path / "logs" / "rank_0.log").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\dT[\d:.]+ INFO relora_ds\.train: loss 3\.5$", text, re.M)


def test_other_ranks_write_their_file_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(tmp_path, 3)
    logging.getLogger("relora_ds").error("on rank 3")
    assert capsys.readouterr().err == ""
    assert "ERROR relora_ds: on rank 3" in (tmp_path / "logs" / "rank_3.log").read_text()


def test_configuring_again_replaces_and_appends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for message in ("first", "second"):
        configure_logging(tmp_path, 0)
        logging.getLogger("relora_ds").info(message)
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert len((tmp_path / "logs" / "rank_0.log").read_text().splitlines()) == 2
    configure_logging(tmp_path / "other", 0)
    logging.getLogger("relora_ds").info("third")
    assert "third" not in (tmp_path / "logs" / "rank_0.log").read_text()
    assert "third" in (tmp_path / "other" / "logs" / "rank_0.log").read_text()


def test_a_full_disk_is_told_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(tmp_path, 3)
    (handler,) = (each for each in logging.getLogger().handlers if "LogFile" in str(each.name))
    assert isinstance(handler, logging.FileHandler)
    handler.setStream(open("/dev/full", "a"))  # noqa: SIM115 - the handler closes it
    for message in ("first", "second"):
        logging.getLogger("relora_ds").info(message)
    configure_logging(tmp_path, 3)  # which closes it, with what is left unwritten
    logging.getLogger("relora_ds").info("third")
    path = tmp_path / "logs" / "rank_3.log"
    said = f"cannot write {path}: No space left on device; lines of it are lost\n"
    assert capsys.readouterr().err == said
    assert path.read_text().endswith("third\n")


def test_a_mistake_in_a_message_is_not_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(tmp_path, 3)
    (handler,) = (each for each in logging.getLogger().handlers if "LogFile" in str(each.name))
    handler.handle(logging.LogRecord("a", logging.INFO, "b", 1, "%d steps", ("three",), None))
    assert "TypeError" in capsys.readouterr().err


@pytest.mark.timeout(10)
def test_a_pipe_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "rank_1.log")
    with pytest.raises(ConfigError, match=r"rank_1\.log: it is a pipe"):
        configure_logging(tmp_path, 1)


def test_libraries_are_quiet_and_warnings_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = logging.getLogger("DeepSpeed")
    engine.addHandler(logging.StreamHandler())
    engine.propagate = False
    configure_logging(tmp_path, 0)
    engine.info("noise")
    engine.error("from the engine")
    logging.getLogger("megatron.core.utils").warning("noise")
    logging.getLogger("matplotlib.font_manager").info("noise")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("from python", stacklevel=1)
    text = (tmp_path / "logs" / "rank_0.log").read_text()
    assert "noise" not in text
    assert text.count("from the engine") == 1
    assert "UserWarning: from python" in text
    assert capsys.readouterr().err.count("from the engine") == 1


def test_credentials_are_masked_in_messages_and_tracebacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    configure_logging(tmp_path, 0)
    try:
        raise RuntimeError(f"cannot log in with {CANARY}")
    except RuntimeError:
        logging.getLogger("relora_ds").exception("environment: %s", {"WANDB_API_KEY": CANARY})
    written = (tmp_path / "logs" / "rank_0.log").read_text() + capsys.readouterr().err
    assert "RuntimeError: cannot log in with [redacted]" in written
    assert CANARY not in written


def test_a_log_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(ConfigError, match=r"rank_0\.log"):
        configure_logging(tmp_path, 0)
