"""The seam carries a method that the package does not know, through everything a run does.

`toy` registers itself, chooses a matrix-wise optimizer whose moments are not parameter-shaped, and
is trained, compared between ranks, saved, reshaped and resumed at every ZeRO stage and under tensor
parallelism.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.contract import cases
from tests.harness.descriptions import write_model
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed
STEPS, HALF = 8, 4
SIZES = {"one process": (1, 1), "two copies": (2, 1), "a shared copy": (2, 2)}
"""Processes and tensor-parallel processes."""
STAGES = (0, 1, 2, 3)
Lines = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Any) -> tuple[Path, str]:
    """A folder, and a run file of a toy run."""
    folder = tmp_path_factory.mktemp("toy")
    model = write_model(folder, hidden_size=20, intermediate_size=27, num_attention_heads=2)
    for stage in STAGES:
        zero = {"zero_optimization": {"stage": stage}}
        (folder / f"zero{stage}.json").write_text(json.dumps(zero))
    run = {
        "output_dir": str(folder / "unused"),
        "model": str(model),
        "deepspeed": str(folder / "zero0.json"),
        "method": {"name": "toy", "width": 4},
        "data": {
            "train": str(tiny_corpus.train),
            "valid": str(tiny_corpus.valid),
            "tokenizer": str(tiny_corpus.tokenizer),
        },
        "train": {
            "steps": STEPS,
            "seq_length": 32,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "precision": "fp32",
            "digest_every": 1,
        },
        "optimizer": {"lr": 1e-2, "adapter_lr": 0.3},
        "eval": {"every": 0, "batches": 1},
        "checkpoint": {"every": HALF, "keep": None},
        "log": {"every": 1},
    }
    path = folder / "toy.yaml"
    path.write_text(json.dumps(run))
    return folder, str(path)


def trained(description: tuple[Path, str], size: str) -> dict[str, tuple[Lines, Lines]]:
    """By stage: a whole run, and its second half resumed from a checkpoint."""
    folder, path = description
    processes, tensor = SIZES[size]
    runs: list[cases.Run] = []
    for stage in STAGES:
        first, again = folder / f"{size} {stage}", folder / f"{size} {stage} again"
        common = [f"deepspeed={folder}/zero{stage}.json", f"parallel.tensor={tensor}"]
        runs.append((path, [*common, f"output_dir={first}"]))
        resumed = f"checkpoint.resume={first}/checkpoints/step_{HALF}"
        runs.append((path, [*common, f"output_dir={again}", resumed]))
    found = run_ranks(cases.train, processes, runs=runs)
    pairs = zip(found[::2], found[1::2], strict=True)
    return {str(stage): pair for stage, pair in zip(STAGES, pairs, strict=True)}


@pytest.fixture(scope="module")
def one_process(description: tuple[Path, str]) -> dict[str, tuple[Lines, Lines]]:
    return trained(description, "one process")


@pytest.fixture(scope="module")
def two_copies(description: tuple[Path, str]) -> dict[str, tuple[Lines, Lines]]:
    return trained(description, "two copies")


@pytest.fixture(scope="module")
def a_shared_copy(description: tuple[Path, str]) -> dict[str, tuple[Lines, Lines]]:
    return trained(description, "a shared copy")


def losses(lines: Lines) -> list[float]:
    return [lines[step]["train/loss"] for step in sorted(lines)]


@pytest.mark.parametrize("size", SIZES)
def test_every_topology_is_the_same_run(size: str, request: pytest.FixtureRequest) -> None:
    reference = request.getfixturevalue("one_process")["0"][0]
    assert losses(reference)[-1] < 0.97 * losses(reference)[0], "it does not learn"
    for stage, (lines, _) in request.getfixturevalue(size.replace(" ", "_")).items():
        assert losses(lines) == pytest.approx(losses(reference), rel=1e-5), stage
        assert [s for s, line in lines.items() if line.get("method/event")] == [4, 8]


@pytest.mark.parametrize("size", SIZES)
def test_a_resumed_run_is_bit_identical(size: str, request: pytest.FixtureRequest) -> None:
    for stage, (lines, again) in request.getfixturevalue(size.replace(" ", "_")).items():
        kept = ("train/loss", "train/grad_norm")
        for step in range(HALF + 1, STEPS + 1):
            assert [again[step][k] for k in kept] == [lines[step][k] for k in kept], (stage, step)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (("two copies", 2), ("one process", 0)),
        (("two copies", 3), ("a shared copy", 1)),
        (("a shared copy", 3), ("two copies", 0)),
        (("a shared copy", 1), ("two copies", 3)),
    ],
    ids=str,
)
def test_other_processes_continue_it(
    source: tuple[str, int],
    target: tuple[str, int],
    description: tuple[Path, str],
    request: pytest.FixtureRequest,
) -> None:
    folder, path = description
    request.getfixturevalue(source[0].replace(" ", "_"))
    processes, tensor = SIZES[target[0]]
    checkpoint = folder / f"{source[0]} {source[1]}" / "checkpoints" / f"step_{HALF}"
    rewritten = folder / f"{source} to {target}" / f"step_{HALF}"
    rewritten.parent.mkdir()
    sizes = {"dp_size": processes // tensor, "stage": target[1], "tp_size": tensor}
    run_ranks(cases.reshape, 1, source=str(checkpoint), target=str(rewritten), **sizes)
    runs = [
        (
            path,
            [
                f"deepspeed={folder}/zero{target[1]}.json",
                f"parallel.tensor={tensor}",
                f"output_dir={folder}/{source} to {target} {number}",
                f"checkpoint.resume={origin}",
            ],
        )
        for number, origin in enumerate((checkpoint, rewritten))
    ]
    reference = losses(request.getfixturevalue("one_process")["0"][0])[HALF:]
    for lines in run_ranks(cases.train, processes, runs=runs):
        assert losses(lines) == pytest.approx(reference, rel=1e-5)


def test_without_dense_weights_a_run_ends_without_an_export(
    description: tuple[Path, str], tiny_corpus: Any
) -> None:
    folder, path = description
    overrides = [f"output_dir={folder}/opaque", "eval.batches=null"]
    found = run_ranks(
        cases.train_opaque, 1, path=path, overrides=overrides, data=str(tiny_corpus.valid)
    )
    assert found["summary"]["status"] == "completed"
    final = found["summary"]["final"]
    assert found["score"]["loss"] == pytest.approx(final["eval/loss"], rel=1e-5)
    assert "has no dense weights" in found["refusal"]
    assert not found["exported"]
    before_training, _, _ = found["log"].partition("trained and")
    assert "ends without a Hugging Face export" in before_training
