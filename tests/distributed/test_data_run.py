"""Runs on a blend, with validation held out of it; and runs that keep documents apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from relora_ds.data.tokens import TokenFile
from tests.conftest import TinyCorpus
from tests.harness.descriptions import describe, write_zero
from tests.harness.run import metrics, run, write_run

pytestmark = pytest.mark.distributed


@pytest.fixture
def blend_run(tmp_path: Path, tiny_corpus: TinyCorpus) -> dict[str, Any]:
    """A run of a second on three parts of one file and one of another, a tenth held out of each."""
    method = {"name": "low_rank", "rank": 4}
    described = describe(tmp_path, method, 2, tiny_corpus.files, checkpoint={"every": 2})
    described["train"]["steps"] = 5
    described["schedule"] = {"name": "constant"}
    described["data"] = {
        "train": [[3, str(tiny_corpus.train)], [1, str(tiny_corpus.valid)]],
        "valid_share": 0.1,
        "tokenizer": str(tiny_corpus.tokenizer),
    }
    return described


def test_sources_and_split_last_over_a_resume(blend_run: dict[str, Any], tmp_path: Path) -> None:
    output_dir = Path(blend_run["output_dir"])
    unbroken = blend_run | {"output_dir": str(tmp_path / "unbroken")}
    code, output = run([str(write_run(unbroken, tmp_path / "unbroken.yaml"))], processes=2)
    assert code == 0, output
    description = str(write_run(blend_run, tmp_path / "run.yaml"))
    code, output = run([description, "train.steps=4"])
    assert code == 0, output
    code, output = run([description, "checkpoint.allow_change=[train.steps]"])
    assert code == 0, output
    assert "resuming from" in output

    lines, whole = metrics(output_dir), metrics(tmp_path / "unbroken")
    for step in whole:
        figures = {key: value for key, value in lines[step].items() if key.startswith("data/")}
        assert figures == {key: value for key, value in whole[step].items() if key in figures}
        samples = step * blend_run["train"]["global_batch_size"]
        tokens = figures["data/tokens/train"], figures["data/tokens/valid"]
        assert 0 < figures["data/epochs/train"] < figures["data/epochs/valid"]
        assert sum(tokens) == lines[step]["tokens"]
        assert abs(tokens[0] - 0.75 * sum(tokens)) <= lines[step]["tokens"] / samples
    assert lines[5]["eval/loss"] == pytest.approx(whole[5]["eval/loss"], rel=1e-5)
    final = json.loads((output_dir / "summary.json").read_text())["final"]
    assert final["data/tokens/train"] == lines[5]["data/tokens/train"]
    assert final["data/unigram_perplexity"] > 1

    code, output = run([description, "data.valid_share=0.2"])
    assert code == 4
    assert re.search(r"data\.valid_share +0\.1 +0\.2", output)
    code, output = run([description, "data.valid_share=0.0001", "checkpoint.resume=false"])
    assert code == 3
    assert "data.valid_share 0.0001 holds out" in output
    assert not [*output_dir.glob("previous_*")], "what there was stays where it is"


def test_documents_are_kept_apart_on_every_cut(
    blend_run: dict[str, Any], tmp_path: Path, tiny_corpus: TinyCorpus
) -> None:
    files = {key: str(path) for key, path in tiny_corpus.files.items()}
    run_file = blend_run | {"data": files | {"document_mask": True}}
    run_file["train"] = run_file["train"] | {"steps": 3}
    output_dir, cut_dir = Path(blend_run["output_dir"]), tmp_path / "cut"
    code, output = run([str(write_run(run_file, tmp_path / "run.yaml"))])
    assert code == 0, output
    cut_dir.mkdir()
    cut = run_file | {"output_dir": str(cut_dir), "parallel": {"tensor": 2, "sequence": True}}
    cut["deepspeed"] = str(write_zero(cut_dir, 3))
    cut["train"] = cut["train"] | {"activation_checkpointing": True, "micro_batch_size": 1}
    code, output = run([str(write_run(cut, tmp_path / "cut.yaml"))], processes=2)
    assert code == 0, output

    whole, parts = metrics(output_dir), metrics(cut_dir)
    for step in whole:
        for key in ("train/loss", "train/grad_norm"):
            assert parts[step][key] == pytest.approx(whole[step][key], rel=1e-5)
    assert parts[3]["eval/loss"] == pytest.approx(whole[3]["eval/loss"], rel=1e-5)

    scored = []
    for more in ([], ["--no-document-mask"], ["--valid-share", "0.5"]):
        arguments = ["--checkpoint", str(output_dir), "--data", str(tiny_corpus.valid), *more]
        code, output = run(arguments, script="tools/evaluate.py")
        assert code == 0, output
        scored.append(json.loads(output.splitlines()[-1]))
    apart, crossing, held = scored
    assert 0 < held["tokens"] < 0.8 * apart["tokens"]
    assert apart["loss"] != crossing["loss"]
    file, windows = TokenFile(tiny_corpus.valid), crossing["tokens"] // 32
    assert file.metadata is not None
    ends = int((file.window(0, windows * 32) == file.metadata.eos_id).sum())
    assert apart["tokens"] == crossing["tokens"] - ends < crossing["tokens"]
