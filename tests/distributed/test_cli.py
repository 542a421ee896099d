"""The command line: exit codes, messages, stopping, results."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TinyCorpus
from tests.harness.run import metrics, run, run_launcher, start, write_run

pytestmark = pytest.mark.distributed


def test_a_wrong_run_file_exits_2_on_two_ranks(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    tiny_run["method"]["rnak"] = 8
    tiny_run["train"]["steps"] = -1
    description = write_run(tiny_run, tmp_path / "run.yaml")
    code, output = run_launcher([str(description)], processes=2)
    assert code == 2
    assert output.count("method.rnak") == 1, "every rank finds it, one reports it"
    assert "did you mean" in output
    assert "train.steps" in output
    assert "Traceback" not in output


def test_dry_run_prints_the_parameter_table(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    tiny_run["output_dir"] = str(tmp_path / "never")
    code, output = run([str(write_run(tiny_run, tmp_path / "run.yaml")), "--dry-run"])
    assert code == 0, output
    assert "full: steps 1 to 3" in output
    assert "relora: steps 4 to 11" in output
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"data": {"train": "/nonexistent/corpus"}}, 3, ["/nonexistent/corpus"]),
        ({"model": "small"}, 3, ["vocab_size", "token id"]),
        ({"checkpoint": {"resume": True}}, 4, ["checkpoint.resume"]),
    ],
)
def test_unusable_inputs_have_their_exit_code(
    tiny_run: dict[str, Any], tmp_path: Path, change: dict[str, Any], code: int, words: list[str]
) -> None:
    if change.get("model") == "small":
        model = json.loads(Path(tiny_run["model"]).read_text()) | {"vocab_size": 100}
        Path(tiny_run["model"]).write_text(json.dumps(model))
    else:
        for section, values in change.items():
            tiny_run[section] |= values
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    for arguments in ([description], [description, "--dry-run"]):
        found, output = run(arguments)
        assert found == code, output
        assert all(word in output for word in words), output
        assert "Traceback" not in output


def test_divergence_exits_5(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    tiny_run["optimizer"] |= {"lr": 1e30, "clip": 0.0}
    code, output = run([str(write_run(tiny_run, tmp_path / "run.yaml"))])
    assert code == 5, output
    summary = json.loads((Path(tiny_run["output_dir"]) / "summary.json").read_text())
    assert summary["status"] == "diverged"


def test_sigterm_saves_and_exits_75_and_the_run_can_go_on(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    tiny_run["train"]["steps"] = 400
    tiny_run["checkpoint"] = {"every": 0}
    tiny_run["eval"] = {"every": 0, "batches": 1}
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    output_dir = Path(tiny_run["output_dir"])
    process = start([description])
    deadline = time.monotonic() + 120
    while not (output_dir / "metrics.jsonl").is_file() or len(metrics(output_dir)) < 5:
        assert time.monotonic() < deadline, "the run did not start"
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    stopped_at = max(metrics(output_dir))
    assert (output_dir / "checkpoints" / "latest").read_text() == f"step_{stopped_at}"
    assert json.loads((output_dir / "summary.json").read_text())["status"] == "preempted"

    code, output = run(
        [description, f"train.steps={stopped_at + 2}", "checkpoint.allow_change=[train.steps]"]
    )
    assert code == 0, output
    assert f"resuming from {output_dir}/checkpoints/step_{stopped_at}" in output
    assert sorted(metrics(output_dir))[-3:] == [stopped_at, stopped_at + 1, stopped_at + 2]


def test_results_altered_checkpoint_and_other_run(
    tiny_run: dict[str, Any], tmp_path: Path, tiny_corpus: TinyCorpus
) -> None:
    description = str(write_run(tiny_run, tmp_path / "run.yaml"))
    output_dir = Path(tiny_run["output_dir"])
    code, output = run([description])
    assert code == 0, output
    _check_outputs(output_dir)
    _check_tools(output_dir, tiny_corpus, tmp_path)

    code, output = run([description, "method.rank=2"])
    assert code == 4
    assert re.search(r"method\.rank +4 +2", output)

    shard = next((output_dir / "checkpoints" / "step_11").glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, output = run([description])
    assert code == 4
    assert shard.name in output

    code, output = run([description, "checkpoint.resume=false", "train.steps=7"])
    assert code == 0, output
    assert (output_dir / "previous_1" / "checkpoints" / "step_11").is_dir()
    assert max(metrics(output_dir)) == 7


def _check_outputs(output_dir: Path) -> None:
    lines = metrics(output_dir)
    assert sorted(lines) == list(range(1, 12))
    assert {
        "tokens",
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "memory/max_allocated_bytes",
        "memory/build_allocated_bytes",
        "throughput/tokens_per_second",
        "throughput/mfu",
    } <= lines[11].keys()
    assert lines[11]["tokens"] == 11 * 8 * 32
    assert [s for s, line in lines.items() if line.get("method/event") == "merge"] == [6, 9]
    assert lines[6]["method/moments_reset_fraction"] == 1.0
    assert lines[6]["method/function_drift"] <= 1e-6
    assert {s for s, line in lines.items() if "eval/loss" in line} == {5, 10, 11}
    summary = json.loads((output_dir / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["final"]["data/unigram_perplexity"] > 1
    assert (output_dir / "plots" / "loss.png").stat().st_size > 1000
    assert yaml.safe_load((output_dir / "run.yaml").read_text())["method"]["rank"] == 4
    assert (output_dir / "logs" / "rank_0.log").is_file()


def _check_tools(output_dir: Path, corpus: TinyCorpus, tmp_path: Path) -> None:
    """Checkpoint, in-run export, tool export and transformers agree."""
    import torch
    from transformers import AutoModelForCausalLM

    exported = tmp_path / "exported"
    code, output = run(
        ["--checkpoint", str(output_dir), "--output", str(exported)], script="tools/export_hf.py"
    )
    assert code == 0, output
    found = []
    for path in (output_dir / "checkpoints", output_dir / "hf", exported):
        code, output = run(
            ["--checkpoint", str(path), "--data", str(corpus.valid), "--seq-length", "32"],
            script="tools/evaluate.py",
        )
        assert code == 0, output
        found.append(json.loads(output.splitlines()[-1]))
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
    assert found[2] == found[1]

    from relora_ds.data.tokens import TokenFile

    file = TokenFile(corpus.valid)
    count = found[0]["tokens"] // 32
    windows = torch.stack([torch.from_numpy(file.window(i * 32, 33)) for i in range(count)])
    model = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert float(loss) == pytest.approx(found[0]["loss"], rel=1e-5)
