"""Record what small runs of every method end with, to the last bit, and compare two recordings.

A change that is meant to leave numbers alone is held by it: record before, record after, compare.

    python -m tests.golden.record_runs --output before.json --project ../other_checkout
    python -m tests.golden.record_runs --output after.json
    python -m tests.golden.record_runs --compare before.json after.json

With the runs that a recording with --keep left behind, the checkpoints of the version that wrote
them are resumed instead; only the steps after them are compared then.

    python -m tests.golden.record_runs --output resumed.json --resume-from WORK

Only what a user sees is used, so that any two versions can be compared: the command line,
`metrics.jsonl` and the exported model. A cell is a method, a ZeRO stage, and how many processes
(data x tensor); --only takes a regular expression on its name, such as `relora/zero3/2x1`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tests.harness.descriptions import describe

PROJECT = Path(__file__).resolve().parents[2]
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 4},
    "low_rank": {"rank": 4},
    "relora": {"rank": 4, "merge_every": 3, "restart_warmup_steps": 1, "warm_start_steps": 3},
    "sltrain": {"rank": 4, "sparsity": 0.1},
    "switchlora": {"rank": 4, "interval": 4, "freeze_steps": 2},
}
RESUMED_AT = 5
PROCESSES = ((1, 1), (2, 1), (1, 2))
KEPT = ("train/loss", "train/grad_norm", "eval/loss", "method/function_drift")


def cells() -> Iterator[tuple[str, str, int, int, int]]:
    """Name, method, ZeRO stage, data-parallel and tensor-parallel processes of every cell."""
    for method in METHODS:
        for stage in range(4):
            for data, tensor in PROCESSES:
                yield f"{method}/zero{stage}/{data}x{tensor}", method, stage, data, tensor


def prepare_data(project: Path, directory: Path) -> None:
    """A tokenizer and token files from Python's language reference."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    for part, chosen in (("train", names[:40]), ("valid", names[40:46])):
        (directory / f"{part}.txt").write_text("\n\n".join(topics[name] for name in chosen))
    tokenizer = str(directory / "tokenizer.model")
    text = str(directory / "train.txt")
    call(project, "tools/train_tokenizer.py", "--input", text, "--vocab-size", "512",
         "--output", tokenizer)  # fmt: skip
    for part in ("train", "valid"):
        call(project, "tools/prepare_data.py", "--input", str(directory / f"{part}.txt"),
             "--tokenizer", tokenizer, "--output", str(directory / part))  # fmt: skip


def run_cell(
    project: Path, directory: Path, method: str, stage: int, data: int, tensor: int
) -> dict[str, Any]:
    """Train one cell in a directory of its own; what it ended with."""
    output = directory / f"{method}_{stage}_{data}_{tensor}"
    output.mkdir(exist_ok=True)
    data_files = {"train": "train", "valid": "valid", "tokenizer": "tokenizer.model"}
    run = describe(
        output,
        {"name": method, **METHODS[method]},
        stage,
        {key: directory / name for key, name in data_files.items()},
        optimizer={"weight_decay": 0.01},
        parallel={"tensor": tensor},
    )
    run["output_dir"] = str(output)
    path = directory / f"{output.name}.yaml"
    path.write_text(json.dumps(run))
    call(project, "launch/pretrain.py", str(path), processes=data * tensor)
    return outcome(output)


def resume_cell(
    project: Path, directory: Path, method: str, stage: int, data: int, tensor: int, saved: Path
) -> dict[str, Any]:
    """Continue a cell that another version saved below `saved`; what it ended with."""
    name = f"{method}_{stage}_{data}_{tensor}"
    checkpoint = saved / name / "checkpoints" / f"step_{RESUMED_AT}"
    output = directory / name
    call(project, "launch/pretrain.py", str(saved / f"{name}.yaml"), f"output_dir={output}",
         f"checkpoint.resume={checkpoint}", processes=data * tensor)  # fmt: skip
    return {"resumed_at": RESUMED_AT, **outcome(output)}


def outcome(output: Path) -> dict[str, Any]:
    """Metrics by step and a hash of the exported weights of a finished run."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    metrics = {
        str(line["step"]): {key: line[key] for key in KEPT if key in line}
        for line in lines
        if "train/loss" in line
    }
    digest = hashlib.sha256()
    # tensor by tensor: the order of a file's metadata is not reproducible
    for file in sorted((output / "hf").glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.tobytes())
    return {"metrics": metrics, "weights": digest.hexdigest()}


def call(project: Path, script: str, *arguments: str, processes: int = 1) -> None:
    """Run a script of a checkout on as many ranks as asked for, and fail with its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCHDYNAMO_DISABLE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(project),
    }
    command = [sys.executable, script, *arguments]
    ranks = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        own = environment | (place if processes > 1 else {})
        ranks.append(
            subprocess.Popen(
                command, cwd=project, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    outputs = [rank.communicate()[0].decode() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{' '.join(command)} failed:\n" + "\n".join(o[-4000:] for o in outputs))


def record(
    project: Path, output: Path, only: str, work: Path, keep: bool, saved: Path | None
) -> None:
    """Run or resume all cells that match and write what they ended with."""
    work.mkdir(parents=True, exist_ok=True)
    if saved is None:
        prepare_data(project, work)
    found: dict[str, Any] = {}
    for name, method, stage, data, tensor in cells():
        if re.search(only, name):
            started = time.monotonic()
            if saved is None:
                found[name] = run_cell(project, work, method, stage, data, tensor)
            else:
                cell = method, stage, data, tensor
                found[name] = resume_cell(project, work, *cell, saved)
            print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
            output.write_text(json.dumps(found, indent=1) + "\n")
    if not keep:
        shutil.rmtree(work)


def compare(first: Path, second: Path) -> int:
    """Print the cells that differ, of those that both recordings have; 1 if there are any."""
    one, two = json.loads(first.read_text()), json.loads(second.read_text())
    both = [name for name in one if name in two]
    for name in both:  # a resumed cell has no steps before its checkpoint
        first_step = max(cell[name].pop("resumed_at", 0) for cell in (one, two)) + 1
        for cell in (one, two):
            lines = cell[name]["metrics"]
            cell[name]["metrics"] = {s: v for s, v in lines.items() if int(s) >= first_step}
    wrong = [name for name in both if one[name] != two[name]]
    for name in wrong:
        steps = one[name]["metrics"]
        odd = [step for step in steps if steps[step] != two[name]["metrics"].get(step)]
        print(f"{name}: differs in {f'step {odd[0]} first' if odd else 'the weights alone'}")
    print(f"{len(both) - len(wrong)} of {len(both)} cells bit-identical")
    return 1 if wrong or not both else 0


def main() -> int:
    """Record or compare; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE")
    parser.add_argument("--output", type=Path, help="where to write a recording")
    parser.add_argument("--project", type=Path, default=PROJECT, help="checkout [this one]")
    parser.add_argument("--only", default="", metavar="REGEX", help="cells by name [all]")
    parser.add_argument("--work", type=Path, default=Path("/tmp/record_runs"), metavar="DIR")
    parser.add_argument(
        "--resume-from", type=Path, metavar="DIR", help="--work of a kept recording"
    )
    parser.add_argument("--keep", action="store_true", help="leave the runs in --work")
    parsed = parser.parse_args()
    if parsed.compare:
        return compare(*parsed.compare)
    if parsed.output is None:
        parser.error("say --output or --compare")
    how = parsed.only, parsed.work, parsed.keep, parsed.resume_from
    record(parsed.project.resolve(), parsed.output, *how)
    return 0


if __name__ == "__main__":
    sys.exit(main())
