"""Stage G: one of two ranks fails, is killed, or stands still. What is said, and when."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.case import Case, Figures, Sizes
from benchmarks.gpu.processes import Job, Process, group_environment, start, wait

_TIMEOUT_MINUTES = 0.1
_START_S = 60.0
_SAID_WITHIN_S = 2.0
_POLL_S = 0.02
_LOST = 7
_STEPS_BEFORE = 2
_GLOO = {"RELORA_DS_BACKEND": "gloo"}


def cases(tiny: bool) -> list[Case]:
    """All of the stage."""
    functions = {"out of memory": out_of_memory, "killed": killed, "stopped": stopped}
    return [
        Case("G", name, function, {}, 25, 40, limit_s=150, ranks=0, environment=_GLOO)
        for name, function in functions.items()
    ]


def out_of_memory(device: torch.device, sizes: Sizes) -> Figures:
    """Rank 1 asks for more memory than there is: it says so, and both end with a failure."""
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(Path(folder), device, faulty_rank=1)
        fault = Path(folder) / "fault"
        run.wait_for(fault.exists, "the fault")
        since = fault.stat().st_mtime
        said = ("out of memory", "allocate")
        run.wait_for(lambda: any(word in run.output(1).lower() for word in said), "a word of it")
        after = max(0.0, time.time() - since)
        codes = run.end(60 * _TIMEOUT_MINUTES + 30)
        assert after <= _SAID_WITHIN_S, f"it was said after {after:.1f} s only"
        assert all(codes), f"exit codes {codes}: a failed run must not look like a success"
    return {"said_after_s": after, "codes": str(codes)}


def killed(device: torch.device, sizes: Sizes) -> Figures:
    """Rank 1 is killed: rank 0 says that it lost it and leaves with 7."""
    return _loses(device, signal.SIGKILL)


def stopped(device: torch.device, sizes: Sizes) -> Figures:
    """Rank 1 stands still: rank 0 notices within the time limit and leaves with 7."""
    return _loses(device, signal.SIGSTOP)


def _loses(device: torch.device, sent: signal.Signals) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(Path(folder), device)
        run.wait_for(lambda: run.steps() >= _STEPS_BEFORE, f"step {_STEPS_BEFORE}")
        os.kill(run.ranks[1].pid, sent)
        since = time.monotonic()
        ended = wait(run.ranks[:1], since + 60 * _TIMEOUT_MINUTES + 30)
        took = time.monotonic() - since
        code, output = run.ranks[0].code, run.output(0)
        run.kill()
        assert ended, f"rank 0 still runs {took:.0f} s later: {output[-300:]}"
        assert code == _LOST, f"rank 0 left with {code}: {output[-300:]}"
        assert "rank" in output, f"no word about a rank: {output[-300:]}"
    return {"left_after_s": took}


class _Run:
    """A run of thousands of steps on two ranks of this device, by the command line's function."""

    def __init__(self, folder: Path, device: torch.device, faulty_rank: int | None = None) -> None:
        self._folder = folder
        description = _describe(folder)
        fork = os.environ["RELORA_REPORT_FORK"] == "1"
        self.ranks: list[Process] = []
        for rank, environment in enumerate(group_environment(2)):
            fault = str(folder / "fault") if rank == faulty_rank else None
            arguments = {"description": str(description), "fault": fault, "device": device.type}
            job = Job(train, arguments)
            self.ranks.append(start(job, environment, self._log(rank), fork))

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.txt"

    def output(self, rank: int) -> str:
        """What a rank has printed and logged so far."""
        files = [self._log(rank), self._folder / "run" / "logs" / f"rank_{rank}.log"]
        return "".join(f.read_text(errors="replace") for f in files if f.exists())

    def steps(self) -> int:
        """Steps that are logged."""
        metrics = self._folder / "run" / "metrics.jsonl"
        return metrics.read_text().count("train/loss") if metrics.exists() else 0

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait while both ranks run, and a little longer."""
        until = time.monotonic() + _START_S
        while not condition():
            if time.monotonic() > until or all(rank.poll() is not None for rank in self.ranks):
                if condition():
                    return
                said = self.output(0) + self.output(1)
                self.kill()
                raise AssertionError(f"{what} never came: {said[-600:]}")
            time.sleep(_POLL_S)

    def end(self, within_s: float) -> list[int | None]:
        """Exit codes; a rank that is not over in time is an error."""
        ended = wait(self.ranks, time.monotonic() + within_s)
        codes = [rank.code for rank in self.ranks]
        self.kill()
        assert ended, f"a rank still runs {within_s:.0f} s later: exit codes {codes}"
        return codes

    def kill(self) -> None:
        """End both."""
        for rank in self.ranks:
            rank.kill()


def train(description: str, fault: str | None, device: str) -> int:
    """The command of a rank; with a file for `fault`, its third step asks for too much memory."""
    from relora_ds.train.main import main

    if fault is not None:
        _plan_fault(Path(fault), device)
    return main([description])


def _plan_fault(file: Path, device: str) -> None:
    from relora_ds.engine.engine import TrainEngine

    whole, steps = TrainEngine.train_step, 0

    def faulty(self: TrainEngine, micro_batches: Any, admit: Any = None) -> Any:
        nonlocal steps
        steps += 1
        if steps > _STEPS_BEFORE:
            file.touch()
            torch.empty(1 << 50, dtype=torch.uint8, device=device)
        return whole(self, micro_batches, admit)

    TrainEngine.train_step = faulty


@dataclass(frozen=True)
class _Corpus:
    train: str
    tokenizer: str


def _describe(folder: Path) -> Path:
    corpus = _corpus(folder)
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 43,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    run = {
        "output_dir": str(folder / "run"),
        "model": str(folder / "model.json"),
        "deepspeed": str(folder / "zero.json"),
        "method": {"name": "relora", "rank": 2, "merge_every": 1000, "restart_warmup_steps": 1},
        "data": {"train": corpus.train, "valid": corpus.train, "tokenizer": corpus.tokenizer},
        "train": {
            "steps": 100_000,
            "seq_length": 16,
            "micro_batch_size": 1,
            "global_batch_size": 2,
            "precision": "fp32",
            "timeout_minutes": _TIMEOUT_MINUTES,
        },
        "schedule": {"warmup_steps": 2},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "log": {"every": 1},
    }
    description = folder / "run.yaml"
    description.write_text(json.dumps(run))  # JSON is YAML
    return description


def _corpus(folder: Path) -> _Corpus:
    """A few pages of English that ship with Python."""
    from pydoc_data.topics import topics

    from relora_ds.data.prepare import prepare
    from relora_ds.data.tokenizer import train_tokenizer

    text, tokenizer = folder / "train.txt", folder / "tokenizer.model"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics)[:20]))
    train_tokenizer([str(text)], 512, str(tokenizer))
    prepare([str(text)], str(tokenizer), str(folder / "train"))
    return _Corpus(str(folder / "train"), str(tokenizer))
