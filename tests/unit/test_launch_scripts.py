"""The launch scripts refuse what they could only pass on wrongly."""

from __future__ import annotations

import os
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


def test_a_missing_hostfile_is_an_error_and_no_local_run(tmp_path: Path) -> None:
    command = ["bash", "launch/multi_node.sh", str(tmp_path / "none"), RUN]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | _CPU, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"there is no hostfile {tmp_path}/none" in done.stderr
