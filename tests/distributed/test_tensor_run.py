"""A whole run over a shared model: warm start, switches, resume on other shapes, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint
from tests.harness.descriptions import write_model
from tests.harness.run import metrics, run, write_run

pytestmark = pytest.mark.distributed


def losses(output_dir: Path) -> dict[int, float]:
    return {step: line["train/loss"] for step, line in metrics(output_dir).items()}


def test_a_shared_model_is_continued_by_one_process_and_back(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    method = tiny_run["method"]
    tiny_run["method"] = {
        "name": "switchlora",
        "rank": method["rank"],
        "warm_start_steps": 3,
        "interval": 4,
        "freeze_steps": 1,
    }
    tiny_run["optimizer"] = {"eps": 1e-3}
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    shared = Path(tiny_run["output_dir"])
    code, output = run([description, "parallel.tensor=2"], processes=2)
    assert code == 0, output
    checkpoints = shared / "checkpoints"
    assert (checkpoints / "step_5" / "method_tp_1.safetensors").is_file()

    exported = load_file(shared / "hf" / "model.safetensors")
    for name, value in DenseModel(checkpoints / "step_11").weights().items():
        assert torch.equal(exported[name], value), name

    expected = losses(shared)
    whole = tmp_path / "whole"
    reshape_checkpoint(checkpoints / "step_5", whole, dp_size=1, tp_size=1)
    for source in (whole, checkpoints / "step_5"):
        alone = tmp_path / f"alone_{source.name}"
        arguments = [description, f"output_dir={alone}", f"checkpoint.resume={source}"]
        code, output = run(arguments)
        assert code == 0, output
        assert losses(alone) == pytest.approx(
            {step: loss for step, loss in expected.items() if step > 5}, rel=1e-5
        )
    back = tmp_path / "back"
    source = tmp_path / "alone_whole" / "checkpoints" / "step_7"
    arguments = [description, f"output_dir={back}", f"checkpoint.resume={source}"]
    code, output = run([*arguments, "parallel.tensor=2"], processes=2)
    assert code == 0, output
    found = losses(back)
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-5)
    assert min(found) > 7


def test_three_share_sequences_that_a_power_of_two_does_not_divide(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """Also where fewer tokens are read than in training: by the rows of the published protocol, of
    which the last token is a target only, and by the probe of an event."""
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 8}
    write_model(tmp_path, **heads, max_position_embeddings=256)
    tiny_run["method"] = {"name": "relora", "rank": 3, "merge_every": 2, "restart_warmup_steps": 1}
    tiny_run["train"] |= {"steps": 4, "seq_length": 192, "global_batch_size": 2}
    tiny_run["eval"] = {"every": 2, "batches": 2, "protocol": "galore_compat"}
    tiny_run["checkpoint"] = {"every": 0}
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    found = []
    for size in (1, 3):
        output_dir = tmp_path / f"of_{size}"
        cut = [f"parallel.tensor={size}", f"parallel.sequence={str(size > 1).lower()}"]
        code, output = run([description, f"output_dir={output_dir}", *cut], processes=size)
        assert code == 0, output
        lines = metrics(output_dir)
        assert lines[2]["method/function_drift"] < 1e-6
        found.append([lines[step][f"{kind}/loss"] for step in (2, 4) for kind in ("train", "eval")])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_wrong_sizes_are_refused(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    code, output = run([description, "parallel.tensor=2"])
    assert code == 2, output
    assert "parallel.tensor is 2, but must divide the number of processes (1)" in output
