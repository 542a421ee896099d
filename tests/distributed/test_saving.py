"""Saving by two ranks: in the background as in the foreground, and on a disk that is full."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.faults import Call, Fault, Moment, Sleep
from tests.harness.jobs import run_job
from tests.harness.run import metrics, run, write_run

pytestmark = pytest.mark.distributed

FIGURES = ("train/loss", "train/grad_norm", "eval/loss", "method/function_drift")


def figures(output: Path) -> dict[int, list[Any]]:
    return {step: [line.get(key) for key in FIGURES] for step, line in metrics(output).items()}


def contents(checkpoint: Path) -> dict[str, Any]:
    """Every file by name, without what names the run and its settings."""
    differing = ("run.yaml", "manifest.json", "trainer.json")
    found: dict[str, Any] = {
        p.name: p.read_bytes() for p in checkpoint.iterdir() if p.name not in differing
    }
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    del trainer["sha256"]["run.yaml"]
    return found | {"trainer.json": trainer}


SWITCHLORA = {"name": "switchlora", "rank": 4, "interval": 2, "freeze_steps": 1}
COPY = Moment("a copy begins", Call("relora_ds.checkpoint.saving.snapshot:Snapshot.copy"))


@pytest.mark.parametrize(("stage", "method"), [(0, {}), (2, {}), (3, SWITCHLORA)])
def test_in_the_background_the_same_bytes_and_losses(
    tiny_run: dict[str, Any], tmp_path: Path, stage: int, method: dict[str, Any]
) -> None:
    """However long a rank takes to copy its state: what would change it waits."""
    zero = {"zero_optimization": {"stage": stage}}
    Path(tiny_run["deepspeed"]).write_text(json.dumps(zero))
    tiny_run["method"] = method or tiny_run["method"]
    outputs = {}
    for asynchronous in (False, True):
        outputs[asynchronous] = output = tmp_path / f"asynchronous_{asynchronous}"
        tiny_run["output_dir"] = str(output)
        tiny_run["checkpoint"]["asynchronous"] = asynchronous
        description = write_run(tiny_run, tmp_path / "run.yaml")
        slow = [Fault(COPY, Sleep(0.2), rank, again=True) for rank in (0, 1)]
        end = run_job([str(description)], *slow)
        assert end.code == 0, end.said
        assert bool(end.struck) == asynchronous
    assert figures(outputs[True]) == figures(outputs[False])
    expected = sorted(p.name for p in (outputs[False] / "checkpoints").iterdir())
    assert sorted(p.name for p in (outputs[True] / "checkpoints").iterdir()) == expected
    for name in expected[1:]:
        found = contents(outputs[True] / "checkpoints" / name)
        assert found == contents(outputs[False] / "checkpoints" / name), name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_goes_on(
    tiny_run: dict[str, Any], small_disk: Path, tmp_path: Path
) -> None:
    tiny_run["output_dir"] = str(tmp_path / "unbroken")
    code, text = run([str(write_run(tiny_run, tmp_path / "run.yaml"))], processes=2)
    assert code == 0, text
    size = sum(p.stat().st_size for p in (tmp_path / "unbroken/checkpoints/step_3").iterdir())

    output = small_disk / "run"
    checkpoints = output / "checkpoints"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(max(0, (16 << 20) - int(2.5 * size))))
    tiny_run["output_dir"] = str(output)
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    code, text = run([description], processes=2)
    assert code == 4, text
    assert "Traceback" not in text
    assert "no checkpoint of step 3 was saved: rank " in text
    assert "free the difference, or keep fewer" in text
    assert f"{checkpoints / 'step_2'} is complete" in text
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == ["latest", "step_1", "step_2"]

    filler.unlink()
    code, text = run([description], processes=2)
    assert code == 0, text
    assert figures(output) == figures(tmp_path / "unbroken")
    summary = json.loads((output / "summary.json").read_text())
    assert summary["final"]["checkpoint/bytes"] > 0
