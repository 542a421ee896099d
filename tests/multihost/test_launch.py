"""Launching over ssh: lost hosts, links, launchers and ranks end a run in time, and it resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.harness.run import metrics, write_run
from tests.multihost.hosts import Hosts, missing

_REASON = missing()
pytestmark = [
    pytest.mark.multihost,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
]

RANKS = "^[^ ]*python[^ ]* -u launch/pretrain.py"
EVERYTHING = "launch/pretrain.py|deepspeed.launcher|multi_node.sh|^pdsh"
SILENCE_S = 60  # until ssh gives an unreachable host up, see launch/multi_node.sh
SLACK_S = 90  # for starts and saves on two busy cores


@pytest.fixture
def long_run(tiny_run: dict[str, Any]) -> dict[str, Any]:
    """Long enough to be interrupted, with a checkpoint, merges and an evaluation on the way."""
    tiny_run["train"] |= {"steps": 150, "timeout_minutes": 0.25, "global_batch_size": 12}
    tiny_run["method"] |= {"merge_every": 35, "warm_start_steps": 10}
    tiny_run["checkpoint"] = {"every": 25, "keep": 2}
    tiny_run["eval"] = {"every": 50, "batches": 1}
    return tiny_run


@contextmanager
def launched(
    hosts: Hosts, hostfile: Path, run: dict[str, Any], path: Path, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """`launch/multi_node.sh` on host-a."""
    command = ["bash", "launch/multi_node.sh", str(hostfile), str(write_run(run, path))]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | environment
    process = hosts.start("host-a", command, env)
    try:
        yield process
    finally:
        process.kill()


def finish(process: subprocess.Popen[str], bound_s: float) -> tuple[int, str]:
    output, _ = process.communicate(timeout=bound_s)
    return process.returncode, output


def wait_for_step(process: subprocess.Popen[str], output_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not (output_dir / "metrics.jsonl").is_file() or step > max(metrics(output_dir) or [0]):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.1)


def wait_for_silence(hosts: Hosts, bound_s: float) -> None:
    """No process of a launch is left on any host that is up."""
    deadline = time.monotonic() + bound_s
    while left := [hosts.processes(name, EVERYTHING) for name in hosts.names]:
        if not any(left):
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def latest(run: dict[str, Any]) -> Path:
    checkpoints = Path(run["output_dir"]) / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text()


def assert_same_end(found: dict[str, Any], expected: dict[str, Any], after: int) -> None:
    """Losses after a step and the weights at the end agree bit for bit."""
    ours, theirs = (metrics(Path(run["output_dir"])) for run in (found, expected))
    assert max(ours) == max(theirs)
    for step in range(after + 1, max(theirs) + 1):
        for figure in ("train/loss", "train/grad_norm", "eval/loss"):
            assert ours[step].get(figure) == theirs[step].get(figure), (step, figure)
    for name in ("side.safetensors",):
        sides = [load_file(latest(run) / name) for run in (found, expected)]
        assert sides[0].keys() == sides[1].keys()
        assert all(torch.equal(value, sides[1][key]) for key, value in sides[0].items())
    models = [next(latest(run).glob("*model_states.pt")) for run in (found, expected)]
    weights = [torch.load(path, weights_only=False)["module"] for path in models]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_another_host_takes_over_from_a_crashed_one(
    long_run: dict[str, Any], tmp_path: Path
) -> None:
    with Hosts(tmp_path / "hosts", ("host-a", "host-b", "host-c")) as hosts:
        two = hosts.hostfile(host_a=1, host_b=1)
        unbroken = long_run | {"output_dir": str(tmp_path / "unbroken")}
        with launched(hosts, two, unbroken, tmp_path / "unbroken.yaml") as process:
            code, output = finish(process, 400)
        assert code == 0, output
        wait_for_silence(hosts, 5)

        with launched(hosts, two, long_run, tmp_path / "run.yaml") as process:
            wait_for_step(process, Path(long_run["output_dir"]), 60)
            hosts.crash("host-b")
            code, output = finish(process, SLACK_S)
        assert code == 7, output
        assert "lost contact with another rank" in output
        wait_for_silence(hosts, 5)

        saved = int(latest(long_run).name.removeprefix("step_"))
        others = hosts.hostfile(host_a=1, host_c=1)
        with launched(hosts, others, long_run, tmp_path / "run.yaml") as process:
            code, output = finish(process, 400)
        assert code == 0, output
        assert f"resuming from {latest(long_run).with_name(f'step_{saved}')}" in output
        assert_same_end(long_run, unbroken, saved)


def test_a_cut_link_exits_7_within_the_timeout(long_run: dict[str, Any], tmp_path: Path) -> None:
    long_run["train"]["steps"] = 5000
    timeout_s = 60 * long_run["train"]["timeout_minutes"]
    with Hosts(tmp_path / "hosts") as hosts:
        two = hosts.hostfile(host_a=1, host_b=1)
        with launched(hosts, two, long_run, tmp_path / "run.yaml") as process:
            wait_for_step(process, Path(long_run["output_dir"]), 30)
            hosts.cut("host-b")
            deadline = time.monotonic() + timeout_s + 30
            while hosts.processes("host-a", RANKS) or hosts.processes("host-b", RANKS):
                assert time.monotonic() < deadline, "a rank waits longer than the timeout"
                time.sleep(0.2)
            code, output = finish(process, SILENCE_S + SLACK_S)
        assert code == 7, output
        assert "timed out" in output.lower()
        hosts.mend("host-b")
        wait_for_silence(hosts, 5)


def test_sigterm_saves_on_all_hosts_and_keys_stay_at_home(
    long_run: dict[str, Any], tmp_path: Path
) -> None:
    long_run["checkpoint"]["every"] = 0
    long_run["train"]["steps"] = 5000
    keys = {"WANDB_API_KEY": "canary-1", "MLFLOW_TRACKING_TOKEN": "canary-2"}
    with Hosts(tmp_path / "hosts", ("host-a", "host-b", "host-c")) as hosts:
        three = hosts.hostfile(host_a=1, host_b=1, host_c=1)
        run = launched(hosts, three, long_run, tmp_path / "run.yaml", NCCL_DEBUG="WARN", **keys)
        with run as process:
            wait_for_step(process, Path(long_run["output_dir"]), 20)
            for name in hosts.names:
                assert hosts.processes(name, "canary") == {}
                (rank,) = hosts.processes(name, RANKS)
                environment = hosts.output(name, ["cat", f"/proc/{rank}/environ"]).split("\0")
                assert {"NCCL_DEBUG=WARN", "OMP_NUM_THREADS=1"} <= set(environment)
                assert not any("canary" in variable for variable in environment)
            (script,) = hosts.processes("host-a", "^bash launch/multi_node.sh")
            hosts.kill("host-a", script, signal.SIGTERM)
            code, output = finish(process, SLACK_S)
        assert code == 75, output
        wait_for_silence(hosts, 5)
        stopped_at = max(metrics(Path(long_run["output_dir"])))
        assert latest(long_run).name == f"step_{stopped_at}"

        # the same three ranks on two hosts
        long_run["train"]["steps"] = stopped_at + 3
        long_run["checkpoint"]["allow_change"] = ["train.steps"]
        fewer = hosts.hostfile(host_a=1, host_c=2)
        with launched(hosts, fewer, long_run, tmp_path / "run.yaml") as process:
            code, output = finish(process, 400)
        assert code == 0, output
        assert max(metrics(Path(long_run["output_dir"]))) == stopped_at + 3


@pytest.mark.parametrize(
    ("victim", "host"),
    [
        ("^bash launch/multi_node.sh", "host-a"),
        ("bin/deepspeed", "host-a"),
        ("-m deepspeed.launcher.launch", "host-b"),
    ],
    ids=["script", "runner", "node launcher"],
)
def test_ranks_without_a_launcher_save_and_end(
    long_run: dict[str, Any], tmp_path: Path, victim: str, host: str
) -> None:
    """Silent ranks as well: nothing is logged between the kill and the end."""
    long_run["checkpoint"]["every"] = 0
    long_run["log"]["every"] = 20
    long_run["train"]["steps"] = 5000
    with Hosts(tmp_path / "hosts") as hosts:
        two = hosts.hostfile(host_a=1, host_b=1)
        with launched(hosts, two, long_run, tmp_path / "run.yaml") as process:
            wait_for_step(process, Path(long_run["output_dir"]), 20)
            for pid in hosts.processes(host, victim):
                hosts.kill(host, pid, signal.SIGKILL)
            code, output = finish(process, SLACK_S)
            wait_for_silence(hosts, SLACK_S)
        assert code != 0, output
        assert latest(long_run).name == f"step_{max(metrics(Path(long_run['output_dir'])))}"
