"""The launch scripts set up their environment once, and refuse what they would pass on wrongly."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_CPU = {"DS_ACCELERATOR": "cpu"}
RUN = "configs/run/quickstart.yaml"


def _launch(
    tmp_path: Path, hostfile: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "hosts"
    path.write_text(hostfile)
    # nothing may be started, so a program that is needed for it stands in for none of ours
    (tmp_path / "pdsh").write_text("#!/bin/sh\necho started anyway\nexit 99\n")
    (tmp_path / "pdsh").chmod(0o755)
    return subprocess.run(
        ["bash", "launch/multi_node.sh", str(path), *arguments],
        cwd=ROOT,
        env=os.environ | _CPU | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("hostfile", "arguments", "environment", "words"),
    [
        ("", [RUN], {}, "names no node"),
        ("node-a slots=0\n", [RUN], {}, "hosts:1: not `name slots=N`: node-a slots=0"),
        ("# two\nnode-a slots=2\nnode-b\n", [RUN], {}, "hosts:3: not `name slots=N`: node-b"),
        ("node-a;reboot slots=1\n", [RUN], {}, "hosts:1"),
        ("me@node-a slots=1\n", [RUN], {}, "users and ports go into ~/.ssh/config"),
        ("node-a slots=1 island=\n", [RUN], {}, "hosts:1: not `name slots=N`"),
        ("node-a slots=1 island=x\nnode-b slots=1\n", [RUN], {}, "hosts:2: every node needs"),
        ("node-a slots=1\nnode-b slots=1 island=x\n", [RUN], {}, "hosts:2: every node needs"),
        (
            "a slots=1 island=x\nb slots=1 island=y\nc slots=1 island=x # again\n",
            [RUN],
            {},
            "hosts:3: island=x is named again",
        ),
        (
            "a slots=1 island=x\nb slots=2 island=y\n",
            [RUN],
            {},
            "island=x has 1 slots and island=y has 2: islands are equally large",
        ),
        ("node-a slots=1\n", [], {}, "usage"),
        ("node-a slots=1\n", [RUN, "output_dir=$HOME/x"], {}, "write it into the run file"),
        ("node-a slots=1\n", [RUN, "log.wandb.name='a'"], {}, "write it into the run file"),
        ("node-a slots=1\n", [RUN], {"NCCL_DEBUG_FILE": "`id`"}, "NCCL_DEBUG_FILE=`id`"),
        ("node-a slots=1\n", [RUN], {"FORWARD": "A_KEY", "A_KEY": "k"}, "A_KEY looks like"),
    ],
)
def test_mistakes_exit_2_before_anything_is_started(
    tmp_path: Path, hostfile: str, arguments: list[str], environment: dict[str, str], words: str
) -> None:
    done = _launch(tmp_path, hostfile, *arguments, **environment)
    assert done.returncode == 2, done
    assert words in done.stderr
    assert "started anyway" not in done.stdout + done.stderr


def test_files_are_found_where_the_caller_is(tmp_path: Path) -> None:
    (tmp_path / "my hosts").write_text("node-a slots=0\n")
    script = ROOT / "launch" / "multi_node.sh"
    for name, words in (("my hosts", f"{tmp_path}/my hosts:1"), ("others", "no hostfile others")):
        done = subprocess.run(
            ["bash", str(script), name, RUN],
            cwd=tmp_path,
            env=os.environ | _CPU,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert words in done.stderr


def test_a_missing_hostfile_is_an_error_and_no_local_run(tmp_path: Path) -> None:
    command = ["bash", "launch/multi_node.sh", str(tmp_path / "none"), RUN]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | _CPU, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"there is no hostfile {tmp_path}/none" in done.stderr


def _checkout(root: Path) -> Path:
    """What `launch/environment.sh` needs of a checkout; its pip writes down its arguments."""
    (root / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "environment.sh", root / "launch")
    (root / "requirements.txt").write_text("torch>=1\n")
    (root / "launch" / "constraints.txt").write_text("torch==1\n")
    (root / "pyproject.toml").write_text("[project]\n")
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "activate").touch()
    (root / ".venv" / "bin" / "python").write_text('#!/bin/sh\necho "$*" >>"$PIP_LOG"\n')
    (root / ".venv" / "bin" / "python").chmod(0o755)
    return root


def _installations(root: Path, log: Path) -> tuple[list[str], str]:
    """What sourcing the script installed, and the PYTHONPATH that it left."""
    log.write_text("")
    done = subprocess.run(
        ["bash", "-c", ". launch/environment.sh; echo $PYTHONPATH"],
        cwd=root,
        env=os.environ | _CPU | {"PIP_LOG": str(log), "PYTHONPATH": "/elsewhere"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in log.read_text().splitlines() if " install " in line]
    return lines, done.stdout.splitlines()[-1]


def test_the_environment_is_set_up_once_for_requirements_and_project(tmp_path: Path) -> None:
    root, log = _checkout(tmp_path / "checkout"), tmp_path / "pip"
    installed, path = _installations(root, log)
    assert [line.split()[-1] for line in installed] == ["torch", "requirements.txt", "."]
    assert all("-c launch/constraints.txt" in line for line in installed)
    assert "--no-deps --no-build-isolation -e ." in installed[-1]
    assert path == f"{root}:/elsewhere"
    assert _installations(root, log) == ([], path)
    for name in ("requirements.txt", "pyproject.toml", "launch/constraints.txt"):
        with (root / name).open("a") as file:
            file.write("# changed\n")
        assert len(_installations(root, log)[0]) == 3, name


def test_an_environment_of_another_checkout_is_used_and_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "pip"
    owner, other = _checkout(tmp_path / "owner"), _checkout(tmp_path / "other")
    shutil.rmtree(other / ".venv")
    (other / ".venv").symlink_to(owner / ".venv")
    (other / "pyproject.toml").write_text("[project]  # another revision\n")
    assert _installations(other, log) == ([], f"{other}:/elsewhere")
    assert not (owner / ".venv" / ".requirements.sha256").exists()
