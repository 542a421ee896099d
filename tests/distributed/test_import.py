"""A run that begins with an imported model is the run that begins with the model's directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.checkpoint.rewriting.import_hf import import_hf
from relora_ds.config.architecture import read_model_config
from relora_ds.model.hf.directory import write_hf
from relora_ds.model.init import InitialWeights, dense_shapes
from tests.conftest import TinyCorpus
from tests.harness.descriptions import describe, write_model, write_zero
from tests.harness.run import metrics, run, write_run

pytestmark = pytest.mark.distributed
TRAIN = {"steps": 4, "seq_length": 16, "micro_batch_size": 1, "global_batch_size": 2,
         "precision": "fp32"}  # fmt: skip
WARM = {"name": "relora", "rank": 4, "merge_every": 2, "restart_warmup_steps": 1,
        "warm_start_steps": 2}  # fmt: skip


def test_a_run_begins_with_an_import(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run_file = describe(
        tmp_path, WARM, 2, tiny_corpus.files, train=TRAIN, schedule={"warmup_steps": 1}
    )
    config = read_model_config(run_file["model"])
    weights = InitialWeights(config, seed=9)
    named = ((name, weights(name, shape)) for name, shape in dense_shapes(config).items())
    write_hf(tmp_path / "hf", config, named, None, torch.bfloat16)
    imported = tmp_path / "imported"
    import_hf(tmp_path / "hf", imported)

    def trained(name: str, processes: int, *changes: str) -> dict[int, Any]:
        output = tmp_path / name
        path = write_run({**run_file, "output_dir": str(output)}, tmp_path / f"{name}.yaml")
        code, said = run([str(path), *changes], processes)
        assert code == 0, said
        return {step: line["train/loss"] for step, line in metrics(output).items()}

    begun = trained("begun", 2, f"checkpoint.resume={imported}")
    assert begun == trained("directory", 2, f"train.init_from={tmp_path / 'hf'}")
    names = "begun", "directory"
    ends = [load_file(tmp_path / name / "hf" / "model.safetensors") for name in names]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])

    # at stage 3, where no process holds a whole embedding for longer than it takes to cut it
    write_zero(tmp_path, 3)
    (tmp_path / "grown").mkdir()
    model = write_model(tmp_path / "grown", vocab_size=576)
    cold = ("method={name: full}", "optimizer.lr=1e-12", "train.steps=2")
    trained("larger", 2, f"model={model}", f"train.init_from={imported}", *cold)
    larger = load_file(tmp_path / "larger" / "hf" / "model.safetensors")
    given = load_file(tmp_path / "hf" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        first = given[name].float()
        torch.testing.assert_close(larger[name][:512], first, atol=1e-9, rtol=0)
        mean = first.mean(0).expand(64, -1)
        torch.testing.assert_close(larger[name][512:], mean, atol=1e-7, rtol=0)

    sltrain = "method={name: sltrain, rank: 4, sparsity: 0.1}"
    again = [str(tmp_path / "begun.yaml"), f"checkpoint.resume={imported}", sltrain, "--dry-run"]
    code, said = run(again)
    assert code == 2, said
    assert f"checkpoint.resume is {imported}, but method sltrain draws" in said
