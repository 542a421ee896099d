"""A killed and resumed run is bit-identical to one that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.export.hf import export_hf
from tests.harness.run import metrics, run, write_run

pytestmark = pytest.mark.distributed

# warm start ends at 3, merges after 6 and 9: the step before, at and after each kind of boundary
RESUME_AT = (3, 5, 6, 7)
FIGURES = ("train/loss", "train/lr", "train/grad_norm", "eval/loss")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unbroken")


def test_resume_is_bit_exact_around_a_merge_and_the_transition(
    tiny_run: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    tiny_run["output_dir"] = str(unbroken / "run")
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    code, output = run([description], processes=2)
    assert code == 0, output
    expected = metrics(unbroken / "run")
    for step in RESUME_AT:
        resumed = tmp_path / f"from_{step}"
        source = unbroken / "run" / "checkpoints" / f"step_{step}"
        code, output = run(
            [description, f"output_dir={resumed}", f"checkpoint.resume={source}"], processes=2
        )
        assert code == 0, output
        found = metrics(resumed)
        assert sorted(found) == [s for s in sorted(expected) if s > step]
        for at, line in found.items():
            for figure in FIGURES:
                assert line.get(figure) == expected[at].get(figure), (step, at, figure)
        assert_same_checkpoint(
            unbroken / "run" / "checkpoints" / "step_11", resumed / "checkpoints" / "step_11"
        )


def test_dense_weights_pass_unchanged_into_the_next_phase_and_run(
    tiny_run: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    """A phase's first update has a learning rate of zero: the next checkpoint shows its start."""
    checkpoints = unbroken / "run" / "checkpoints"
    warm = dict(DenseModel(checkpoints / "step_3").weights())
    _assert_equal(dict(DenseModel(checkpoints / "step_4").weights()), warm)

    export_hf(checkpoints / "step_3", tmp_path / "hf", torch.float32)
    tiny_run["method"]["warm_start_steps"] = 0
    tiny_run["train"]["steps"] = 2
    tiny_run["schedule"]["warmup_steps"] = 1
    for source in (checkpoints / "step_3", tmp_path / "hf"):
        tiny_run["output_dir"] = str(tmp_path / f"from_{source.name}")
        tiny_run["train"]["init_from"] = str(source)
        code, output = run([str(write_run(tiny_run, tmp_path / "run.yaml"))])
        assert code == 0, output
        first = Path(tiny_run["output_dir"]) / "checkpoints" / "step_1"
        _assert_equal(dict(DenseModel(first).weights()), warm)


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Weights, masters, moments and clocks, bit for bit."""
    names = sorted(path.name for path in first.glob("*.pt"))
    assert names == sorted(path.name for path in second.glob("*.pt"))
    for name in names:
        tensors = [
            dict(_tensors(torch.load(d / name, weights_only=False))) for d in (first, second)
        ]
        assert tensors[0].keys() == tensors[1].keys()
        for key, value in tensors[0].items():
            assert torch.equal(value, tensors[1][key]), (name, key)
    sides = [load_file(directory / "side.safetensors") for directory in (first, second)]
    assert sides[0].keys() == sides[1].keys()
    assert all(torch.equal(value, sides[1][key]) for key, value in sides[0].items())


def _tensors(node: Any, path: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(node, torch.Tensor):
        return [(path, node)]
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list | tuple)
        else ()
    )
    return [found for key, value in items for found in _tensors(value, f"{path}/{key}")]
