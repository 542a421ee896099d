"""Faults of a machine and of its nodes are found, each with a remedy."""

from __future__ import annotations

import importlib.metadata
import json
import pwd
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from relora_ds.cli.main import main
from relora_ds.planning.doctor import hosts, machine, meeting
from relora_ds.planning.doctor import packages as packages_module
from relora_ds.planning.doctor.finding import Finding
from relora_ds.planning.doctor.hostfile import read_hostfile


def of(findings: Iterable[Finding], check: str) -> list[Finding]:
    found = [each for each in findings if each.check == check]
    assert found, check
    return found


def test_this_environment_is_as_the_project_wants_it() -> None:
    found = [*packages_module.python_version(), *packages_module.packages()]
    assert {each.status for each in found} == {"ok"}
    assert {"package torch", "package deepspeed"} <= {each.check for each in found}


def test_packages_that_are_missing_or_too_old_are_named_with_their_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.10.0" if name == "torch" else real(name)

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = list(packages_module.packages())
    (missing,), (old,) = of(found, "package deepspeed"), of(found, "package torch")
    assert (missing.status, old.status) == ("problem", "warning")
    assert missing.remedy == "pip install 'deepspeed==0.19.8'"
    assert "2.10.0" in old.said


def test_an_old_interpreter_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    (found,) = packages_module.python_version()
    assert found.status == "problem"
    assert "3.11 to 3.13" in found.remedy


def test_a_port_that_is_taken_or_none_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        number = holder.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(number))
        (taken,) = machine.port()
        assert (taken.status, str(number) in taken.said) == ("problem", True)
    (free,) = machine.port()
    assert free.status == "ok"
    monkeypatch.setenv("MASTER_PORT", "http")
    (wrong,) = machine.port()
    assert wrong.status == "problem"


def test_little_space_and_a_shifted_clock_are_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plenty,) = machine.disk(tmp_path / "runs" / "new")
    assert (plenty.status, str(tmp_path) in plenty.said) == ("ok", True)
    monkeypatch.setattr(machine, "_LEAST_FREE", 1 << 60)
    monkeypatch.setattr(machine.time, "time", lambda: 1000.0)
    little, skew = machine.disk(tmp_path)
    assert (little.status, skew.status) == ("warning", "warning")
    assert "chronyc" in skew.remedy


def test_a_place_that_cannot_be_written_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "NamedTemporaryFile", refuse)
    (found,) = machine.disk(tmp_path)
    assert (found.status, "Permission denied" in found.said) == ("problem", True)


def test_credentials_that_would_travel_and_missing_interfaces_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("WANDB_API_KEY=hunter2\nNCCL_DEBUG=INFO\n")
    environ = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth"}
    found = list(machine.variables(environ, {1: "lo", 2: "eth0"}))
    assert any("NCCL_SOCKET_IFNAME=ib0" in each.said for each in found)
    assert not any("GLOO" in each.said for each in found)
    said = " ".join(each.said for each in found)
    assert "WANDB_API_KEY" in said
    assert "hunter2" not in said
    excluded = machine.variables({"NCCL_SOCKET_IFNAME": "^docker"}, {1: "eth0"})
    assert not any("docker" in each.said for each in excluded)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a slots=2\nb slots=2\n# c\n\n", None),
        ("a slots=2\na slots=1\n", "a once more"),
        ("a slots=0\n", ":1: a slots=0"),
        ("user@a slots=1\n", "user@a"),
        ("# nothing\n", "names no node"),
        ("a slots=2 island=x\nb slots=2 island=y # far\n", None),
        ("a slots=1 island=x\nb slots=2 island=x\n", None),
        ("a slots=2 island=x\nb slots=2\n", "1 of 2 nodes have a mark"),
        ("a slots=2 island=x\nb slots=1 island=y\n", "x has 2, y has 1"),
        ("a slots=1 island=x\nb slots=1 island=y\nc slots=1 island=x\n", "island=x is named again"),
        ("a slots=1 island=\n", ":1: a slots=1 island="),
        ("\udcff\udcfe slots=1\n", ":1: "),
        (None, "No such file"),
    ],
)
def test_hostfiles(tmp_path: Path, text: str | None, problem: str | None) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    nodes, findings = read_hostfile(path)
    if problem is None:
        assert [node.name for node in nodes] == ["a", "b"]
        assert all("island" not in str(node) for node in nodes)
        assert [each.status for each in findings] == ["ok"]
    else:
        assert any(problem in each.said for each in findings if each.status == "problem")


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program in the place of ssh; it gets the node in $1 and the command in $2."""

    def put(script: str) -> None:
        (tmp_path / "ssh").write_text(f"#!/bin/bash\nshift 6\n{script}\n")
        (tmp_path / "ssh").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return put


@pytest.mark.parametrize(
    "script",
    [
        'echo "$(date +%s.%N)"; echo "3.11 2.13 0.19"',
        "printf 'Welcome to \\xff!\\n2 jobs\\n'; date +%s.%N; echo '3.11 2.13 0.19'",
        "date +%s.%%N; echo '3.11 2.13 0.19'",  # of a date that knows no fractions
    ],
)
def test_a_node_that_answers_is_as_this_machine(ssh: Callable[[str], None], script: str) -> None:
    ssh(script)
    assert {each.status for each in hosts.node("n1", "3.11 2.13 0.19")} == {"ok"}


@pytest.mark.parametrize(
    ("script", "check", "said"),
    [
        ("echo 'Permission denied (publickey).' >&2; exit 255", "ssh", "Permission denied"),
        ('echo "$(date +%s.%N)"; echo "3.11 2.11 0.19"', "environment", "2.11"),
        ('echo "$(date +%s.%N)"', "environment", "does not run"),
        ("echo 'This account is not available.'", "ssh", "runs no command, it says 'This acc"),
        ("echo 1000.5; echo '3.11 2.13 0.19'", "clock", "off this machine"),
    ],
)
def test_what_is_wrong_with_a_node(
    ssh: Callable[[str], None], script: str, check: str, said: str
) -> None:
    ssh(script)
    (found,) = of(hosts.node("n1", "3.11 2.13 0.19"), check)
    assert found.status in ("problem", "warning")
    assert said in found.said
    assert found.remedy


def test_the_way_back_is_tried_from_the_node(ssh: Callable[[str], None]) -> None:
    ssh('bash -c "$2"')  # the node's command, run here
    assert hosts.way_back("n1", "127.0.0.1").status == "ok"
    ssh("echo 'Connection timed out' >&2; exit 124")
    found = hosts.way_back("n1", "127.0.0.1")
    assert found.status == "problem"
    assert "Connection timed out" in found.said
    assert "MASTER_ADDR" in found.remedy


def test_the_verb_prints_a_list_and_fails_with_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_PORT", "0")
    arguments = ["doctor", "--no-meeting", "--output-dir", str(tmp_path)]
    assert main([*arguments, "--json"]) == 2
    found = [Finding(**each) for each in json.loads(capsys.readouterr().out)]
    assert [each.check for each in found if each.status == "problem"] == ["port"]
    monkeypatch.delenv("MASTER_PORT")
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 problems")


@pytest.mark.distributed
def test_processes_meet() -> None:
    (found,) = meeting.meet([])
    assert found.status == "ok", found
    assert "2 of 2 ranks met" in found.said


def test_processes_that_cannot_meet_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'RuntimeError: no route to host' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    (found,) = meeting.meet([])
    assert found.status == "problem"
    assert "no route to host" in found.said


def test_a_compiler_may_have_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, status in (("cc -m64", "ok"), ("", "ok"), ("nope -O2", "warning"), ("'", "warning")):
        monkeypatch.setenv("CC", text)
        assert [found.status for found in machine.compiler()] == [status]


def test_a_user_without_a_home_has_no_file_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    assert list(machine.variables({})) == []
