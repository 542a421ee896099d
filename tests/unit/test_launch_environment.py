"""`launch/environment.sh` takes what is there, says what is missing, and never hides a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SHOW = '. launch/environment.sh; echo "$gpus|$OMP_NUM_THREADS|${DS_ACCELERATOR:-}"'
_FORGOTTEN = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PROCESSES")


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment is there, and what the launch scripts start."""
    root = tmp_path / "checkout"
    (root / "launch").mkdir(parents=True)
    for name in ("environment.sh", "quickstart.sh"):
        shutil.copy(ROOT / "launch" / name, root / "launch")
    (root / ".venv").symlink_to(tmp_path / "venv")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").touch()
    _program(tmp_path / "bin" / "deepspeed", 'echo "deepspeed $*"\n')
    _program(tmp_path / "bin" / "nproc", "echo 32\n")
    return root


def _machine(checkout: Path, *, listed: int, torch: str) -> None:
    """A machine of `listed` GPUs by nvidia-smi; `torch` is what torch says of itself."""
    bin_ = checkout.parent / "bin"
    lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(listed))
    _program(
        bin_ / "nvidia-smi", f'if [ "$1" = -L ]; then\n{lines}true\nelse echo 535.104.05; fi\n'
    )
    _program(bin_ / "python", f'if [ "$1" = -c ]; then echo "{torch}"; else echo "python $*"; fi\n')


def _bash(checkout: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in _FORGOTTEN}
    kept["PATH"] = f"{checkout.parent / 'bin'}:{kept['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=checkout,
        env=kept | environment,
        capture_output=True,
        text=True,
    )


def test_gpus_share_the_cores_and_cpu_ranks_take_one_thread(checkout: Path) -> None:
    _machine(checkout, listed=4, torch="4 2.13.0+cu130 13.0")
    assert _bash(checkout, _SHOW).stdout == "4|8|\n"
    assert _bash(checkout, _SHOW, PROCESSES="2").stdout == "4|16|\n"
    assert _bash(checkout, _SHOW, OMP_NUM_THREADS="3").stdout == "4|3|\n"
    assert _bash(checkout, _SHOW, DS_ACCELERATOR="cpu").stdout == "0|1|cpu\n"
    _machine(checkout, listed=0, torch="0 2.13.0+cpu none")
    assert _bash(checkout, _SHOW).stdout == "0|1|cpu\n"


@pytest.mark.parametrize(
    ("torch", "environment", "words"),
    [
        ("0 2.13.0+cu130 13.0", {}, "torch 2.13.0+cu130 for CUDA 13.0 sees none: that driver"),
        ("0 2.13.0+cpu none", {}, "torch 2.13.0+cpu is a build for CPUs"),
        ("0 none", {}, "torch cannot be imported"),
        ("0 2.13.0 13.0", {"CUDA_VISIBLE_DEVICES": ""}, "with CUDA_VISIBLE_DEVICES=''"),
    ],
)
def test_gpus_that_torch_does_not_see_are_an_error(
    checkout: Path, torch: str, environment: dict[str, str], words: str
) -> None:
    _machine(checkout, listed=2, torch=torch)
    done = _bash(checkout, _SHOW, **environment)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "nvidia-smi lists 2 GPUs (driver 535.104.05)" in done.stderr
    assert words in done.stderr
    assert "TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("gpus", "environment", "processes", "micro"),
    [
        (0, {}, 2, 4),
        (0, {"PROCESSES": "1"}, 1, 4),
        (0, {"PROCESSES": "4"}, 4, 2),
        (0, {"PROCESSES": "8"}, 8, 1),
        (1, {}, 1, 4),
        (2, {}, 2, 4),
        (3, {}, 2, 4),
        (4, {}, 4, 2),
        (4, {"PROCESSES": "0"}, 4, 2),
        (7, {}, 4, 2),
        (8, {}, 8, 1),
        (16, {}, 8, 1),
    ],
)
def test_the_quickstart_has_one_batch_on_any_number_of_processes(
    checkout: Path, gpus: int, environment: dict[str, str], processes: int, micro: int
) -> None:
    _machine(checkout, listed=gpus, torch=f"{gpus} 2.13.0 13.0")
    done = _bash(checkout, "bash launch/quickstart.sh method.rank=8", **environment)
    assert done.returncode == 0, done
    launch = done.stdout.splitlines()[0]
    assert f"--num_gpus {processes} " in launch
    assert launch.endswith(f"train.micro_batch_size={micro} method.rank=8")
    assert 8 % (processes * micro) == 0


def test_the_launcher_is_kept_to_the_visible_gpus(checkout: Path) -> None:
    _machine(checkout, listed=8, torch="2 2.13.0 13.0")
    command = "bash launch/quickstart.sh"
    done = _bash(checkout, command, CUDA_VISIBLE_DEVICES="5,7")
    assert "--include localhost:5,7 " in done.stdout
    done = _bash(checkout, command, CUDA_VISIBLE_DEVICES="5,7", PROCESSES="1")
    assert "--include localhost:5 " in done.stdout
    done = _bash(checkout, command, CUDA_VISIBLE_DEVICES="GPU-1234,GPU-5678")
    assert done.returncode == 2
    assert "the launcher takes numbers" in done.stderr


def test_another_torch_index_makes_the_environment_again(tmp_path: Path) -> None:
    root, log = tmp_path / "checkout", tmp_path / "log"
    (root / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "environment.sh", root / "launch")
    for name in ("requirements.txt", "pyproject.toml", "launch/constraints.txt"):
        (root / name).touch()
    # an interpreter whose venv module makes an environment that writes down what pip is told
    _program(tmp_path / "made", 'echo "$*" >>"$LOG"\n')
    _program(
        tmp_path / "python",
        '[ "$1" = -m ] || exit 0\nmkdir -p "$3/bin"\n: >"$3/bin/activate"\necho made >>"$LOG"\n'
        f'cp {tmp_path / "made"} "$3/bin/python"\n',
    )

    def lines(**environment: str) -> list[str]:
        log.write_text("")
        settings = {"LOG": str(log), "PYTHON": str(tmp_path / "python"), "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            ["bash", "-euc", ". launch/environment.sh"],
            cwd=root,
            env=os.environ | settings | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done
        found = log.read_text().splitlines()
        return [line for line in found if line == "made" or line.endswith(" torch")]

    pip = "-m pip install --quiet --disable-pip-version-check -c launch/constraints.txt"
    assert lines() == ["made", f"{pip} torch"]
    assert lines() == []
    other = {"TORCH_INDEX_URL": "https://index/cu126"}
    rebuilt = ["made", f"{pip} --index-url https://index/cu126 torch"]
    assert lines(**other) == rebuilt
    assert lines(**other) == lines() == []
    # what changed is installed from the same index
    (root / "requirements.txt").write_text("# changed\n")
    assert lines() == rebuilt[1:]


def test_an_environment_as_it_is_is_used_without_installing(checkout: Path) -> None:
    (checkout / ".venv").unlink()
    _program(checkout.parent / "bin" / "python", f'exec {sys.executable} "$@"\n')
    done = _bash(checkout, _SHOW, VENV="none", DS_ACCELERATOR="cpu")
    assert (done.returncode, done.stdout) == (0, "0|1|cpu\n"), done
    assert not (checkout / ".venv").exists()


def test_what_an_environment_lacks_is_named_in_one_sentence(checkout: Path) -> None:
    (checkout / ".venv").unlink()
    # without its packages
    _program(checkout.parent / "bin" / "python", f'exec {sys.executable} -I -S "$@"\n')
    done = _bash(checkout, _SHOW, VENV="none", DS_ACCELERATOR="cpu")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"{checkout.parent}/bin/python lacks torch, deepspeed, megatron-core, " in done.stderr
    (checkout.parent / "bin" / "deepspeed").unlink()
    done = _bash(
        checkout,
        _SHOW,
        VENV="none",
        DS_ACCELERATOR="cpu",
        PATH=f"{checkout.parent}/bin:/usr/bin:/bin",
    )
    assert "lacks the command deepspeed, torch, " in done.stderr
    done = _bash(checkout, _SHOW, VENV="nothing")
    assert done.returncode == 2
    assert "VENV is nothing; write none" in done.stderr
    assert not (checkout / ".venv").exists()


def test_the_gpu_report_uses_the_python_that_has_torch(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "gpu_report.sh", tmp_path / "launch")
    _program(tmp_path / "bare", 'case "$2" in *torch*) exit 1 ;; esac\n')
    _program(tmp_path / "torch_only", 'case "$*" in *deepspeed*) echo deepspeed hjson ;; esac\n')
    noted = 'echo "$*" >>"$LOG"; echo "${PYTHONPATH:-}" >>"$LOG"\n'
    _program(tmp_path / "complete", f'case "$*" in *pip*) mkdir .whl/site ;; esac; {noted}')

    def report(python: str, *arguments: str) -> tuple[int, str, list[str]]:
        (tmp_path / "log").write_text("")
        done = subprocess.run(
            ["bash", "launch/gpu_report.sh", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHON": str(tmp_path / python), "LOG": str(tmp_path / "log")},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr, (tmp_path / "log").read_text().splitlines()

    code, said, _ = report("bare")
    assert (code, "has no torch: set PYTHON" in said) == (2, True)
    code, said, _ = report("torch_only", "checks")
    assert (code, "the libraries deepspeed hjson are missing" in said) == (2, True)
    _, _, log = report("complete", "checks", "--budget", "9")
    assert log[-2] == "tools/gpu_report.py checks --budget 9"
    (tmp_path / ".whl").mkdir()
    (tmp_path / ".whl" / "one.whl").touch()
    for first in (True, False):
        code, _, log = report("complete", "speed")
        # once for these wheels, which come after the project itself
        assert (code, any("pip install" in line for line in log)) == (0, first)
        assert log[-1].startswith(f"{tmp_path}:{tmp_path}/.whl/site")
