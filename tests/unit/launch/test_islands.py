"""Nodes are numbered by island, under Slurm and on Kubernetes, as the run file counts them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
_SCONTROL = """#!/bin/sh
printf 'node-1\\nnode-2\\nnode-3\\nnode-4\\n'
"""
_SRUN = """#!/bin/bash
shift
for node in 0 1 2 3; do
  for task in 0 1; do
    SLURM_NODEID=$node SLURM_LOCALID=$task SLURM_PROCID=$((node * 2 + task)) "$@"
  done
done
"""
_PYTHON = """#!/bin/sh
shift
echo "$SLURM_NODEID.$LOCAL_RANK $RANK/$WORLD_SIZE $MASTER_ADDR $*" >>"$STARTED"
"""


def submitted(
    tmp_path: Path, hostfile: str | None
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A job of four nodes with two tasks each: how the script ended, and what tasks started."""
    (tmp_path / "launch").mkdir()
    for name in ("slurm.sbatch", "islands.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    (tmp_path / "launch" / "environment.sh").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("scontrol", _SCONTROL), ("srun", _SRUN), ("python", _PYTHON)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node-[1-4]",
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "8",
        "STARTED": str(tmp_path / "started"),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    if hostfile is not None:
        (tmp_path / "hosts").write_text(hostfile)
        job["ISLANDS"] = "hosts"
    command = ["bash", str(tmp_path / "launch" / "slurm.sbatch"), "run.yaml"]
    done = subprocess.run(command, env=job, capture_output=True, text=True)
    started = tmp_path / "started"
    return done, started.read_text().splitlines() if started.exists() else []


MARKS = """# the west has every other node
node-1 slots=2 island=west
node-3 slots=2 island=west # a note
node-9 slots=2 island=north
node-2 slots=2 island=east
node-4 slots=2 island=east
"""


def test_slurm_numbers_ranks_by_island(tmp_path: Path) -> None:
    done, started = submitted(tmp_path, MARKS)
    assert done.returncode == 0, done
    ranks = {line.split()[0]: line.split()[1] for line in started}
    assert ranks == {
        "0.0": "0/8",
        "0.1": "1/8",
        "2.0": "2/8",
        "2.1": "3/8",
        "1.0": "4/8",
        "1.1": "5/8",
        "3.0": "6/8",
        "3.1": "7/8",
    }
    assert {line.split(" ", 2)[2] for line in started} == {
        "node-1 launch/pretrain.py run.yaml parallel.islands=2"
    }


def test_slurm_without_marks_keeps_its_own_order(tmp_path: Path) -> None:
    done, started = submitted(tmp_path, None)
    assert done.returncode == 0, done
    assert [line.split()[1] for line in started] == [f"{rank}/8" for rank in range(8)]
    assert started[0].endswith("node-1 launch/pretrain.py run.yaml")


@pytest.mark.parametrize(
    ("hostfile", "words"),
    [
        (MARKS.replace("node-4", "node-5"), "hosts: node-4 is a node of the job, but has no line"),
        (
            MARKS.replace("node-3 slots=2 island=west", "node-3 slots=2 island=east"),
            "equally large",
        ),
        (MARKS.replace(" island=west # a note", ""), "hosts: node-3 is a node of the job"),
    ],
)
def test_slurm_refuses_marks_that_do_not_fit(tmp_path: Path, hostfile: str, words: str) -> None:
    done, started = submitted(tmp_path, hostfile)
    assert (done.returncode, started) == (2, [])
    assert words in done.stderr


def _manifest(*selectors: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "kubernetes_islands.py"), *selectors]
    return subprocess.run(command, capture_output=True, text=True)


def _ranks(job: dict[str, Any]) -> dict[int, str]:
    """What a Job's pods tell torchrun, by index: number of the node, of all nodes, and where the
    first one is, with the end of the command."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    said = {}
    for index in range(job["spec"]["completions"]):
        script = container["args"][0].replace("exec torchrun", "echo")
        place = {"JOB_COMPLETION_INDEX": str(index), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            ["bash", "-c", script], env=variables | place, capture_output=True, text=True
        )
        words = done.stdout.split()
        options = dict(zip(words[:-3:2], words[1:-3:2], strict=False))
        named = [options[f"--{name}"] for name in ("node-rank", "nnodes", "master-addr")]
        said[index] = " ".join([*named, words[-1]])
    return said


def test_kubernetes_numbers_nodes_by_island() -> None:
    zone = "topology.kubernetes.io/zone"
    done = _manifest(f"{zone}=west", f"{zone}=east")
    assert done.returncode == 0, done
    service, *jobs = yaml.safe_load_all(done.stdout)
    assert [job["metadata"]["name"] for job in jobs] == ["relora-ds-0", "relora-ds-1"]
    pods = [job["spec"]["template"] for job in jobs]
    assert [pod["spec"]["nodeSelector"] for pod in pods] == [{zone: "west"}, {zone: "east"}]
    # pods of all islands find each other by one service
    for pod in pods:
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    end = "4 relora-ds-0-0.relora-ds parallel.islands=2"
    assert [_ranks(job) for job in jobs] == [
        {0: f"0 {end}", 1: f"1 {end}"},
        {0: f"2 {end}", 1: f"3 {end}"},
    ]


def test_the_shipped_job_is_one_island() -> None:
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    end = "2 relora-ds-0.relora-ds output_dir=/output/llama_1b"
    assert _ranks(job) == {0: f"0 {end}", 1: f"1 {end}"}


@pytest.mark.parametrize("selectors", [(), ("zone=a",), ("zone=a", "zone=a"), ("zone=a", "b")])
def test_islands_of_kubernetes_are_named_by_labels(selectors: tuple[str, ...]) -> None:
    done = _manifest(*selectors)
    assert (done.returncode, done.stdout) == (2, "")
    assert "see --help" in done.stderr
