"""Write a golden checkpoint, and what the run that wrote it went on to.

    python -m tests.golden.make_checkpoint --method relora --format 1
    python -m tests.golden.make_checkpoint --method relora --format 0 --project OTHER --record
    python -m tests.golden.make_checkpoint --method relora --format 2 --stamp

`checkpoints/METHOD_format_N` is the run of `checkpoints/METHOD.yaml` after STEP updates, written by
a checkout that writes format N; for format 0, which has no number, that was commit 9371481. All
formats of a method hold the same run: `METHOD.expected.json` was recorded once, by the checkout of
format 0, and every later version has to continue each of them to the same numbers. Format 2 is that
of format 1 with a stamp in every file of tensors: initial weights are drawn in another way since
then, so that the run cannot be trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from relora_ds.checkpoint.format.manifest import write_manifest
from relora_ds.checkpoint.format.record import read_record, write_record
from relora_ds.checkpoint.format.stamp import KEY, stamp
from relora_ds.checkpoint.format.tensors import write_tensors
from relora_ds.engine.deepspeed.files import read_shard
from tests.golden.record_runs import outcome

GOLDEN = Path(__file__).resolve().parent / "checkpoints"
ROOT = GOLDEN.parents[2]
VALID = GOLDEN / "tokens" / "valid"
STEP = 5


def run_file(method: str) -> Path:
    """The description of a method's run."""
    return GOLDEN / f"{method}.yaml"


def checkpoint(method: str, number: int) -> Path:
    """A method's golden checkpoint of a format."""
    return GOLDEN / f"{method}_format_{number}"


def expected(method: str) -> Path:
    """What was recorded of a method's run."""
    return GOLDEN / f"{method}.expected.json"


def machine() -> dict[str, str]:
    """What the last bits of a product of matrices depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": names[0] if names else "unknown",
    }


def values_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of names and values, whatever file they are in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def export_hash(directory: Path) -> str:
    """SHA-256 of the weights in a Hugging Face directory."""
    return values_hash(
        item for file in directory.glob("*.safetensors") for item in load_file(file).items()
    )


def write_tokens(directory: Path) -> None:
    """Token files of a noisy counter, which a model of a few thousand weights can learn."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    directory.mkdir()
    for name, documents in (("train", 40), ("valid", 8)):
        prefix = str(directory / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for _ in range(documents):
            tokens = (generator.integers(64) + np.cumsum(generator.integers(1, 3, 50))) % 64
            builder.add_document(torch.from_numpy(tokens.astype(np.uint16)), [len(tokens)])
        builder.finalize(f"{prefix}.idx")


def call(project: Path, script: str, *arguments: str) -> str:
    """Output of a script of a checkout, run where the paths of the run file are right."""
    command = [sys.executable, str(project / script), *arguments]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": str(project),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def make(project: Path, method: str, number: int, record: bool) -> None:
    """Train the run with a checkout, keep its checkpoint, and record what followed if asked to."""
    if not VALID.with_suffix(".bin").is_file():
        write_tokens(VALID.parent)
    with tempfile.TemporaryDirectory() as scratch:
        output, exported = Path(scratch) / "run", Path(scratch) / "exported"
        call(project, "launch/pretrain.py", str(run_file(method)), f"output_dir={output}")
        saved = output / "checkpoints" / f"step_{STEP}"
        shutil.rmtree(checkpoint(method, number), ignore_errors=True)
        shutil.copytree(saved, checkpoint(method, number))
        if not record:
            return
        call(project, "tools/export_hf.py", "--checkpoint", str(saved), "--output", str(exported))
        scored = ("--checkpoint", str(saved), "--data", str(VALID))
        metrics = outcome(output)["metrics"]
        found = {
            "machine": machine(),
            "metrics": {step: line for step, line in metrics.items() if int(step) > STEP},
            "export": export_hash(exported),
            "evaluation": json.loads(call(project, "tools/evaluate.py", *scored).splitlines()[-1]),
        }
    expected(method).write_text(json.dumps(found, indent=1) + "\n")


def stamp_files(method: str) -> None:
    """Make format 2 of format 1."""
    source, target = checkpoint(method, 1), checkpoint(method, 2)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    record = read_record(source)
    for path in target.glob("*.pt"):
        torch.save({**read_shard(source / path.name), KEY: stamp(path.name, record.origin)}, path)
    for path in target.glob("*.safetensors"):
        write_tensors(load_file(source / path.name), path, record.origin)
    write_record(record, target)
    write_manifest(target)


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=("relora", "switchlora"), required=True)
    parser.add_argument("--format", type=int, required=True, help="number that the checkout writes")
    parser.add_argument("--project", type=Path, default=ROOT, help="checkout [this one]")
    parser.add_argument("--record", action="store_true", help="write METHOD.expected.json too")
    parser.add_argument("--stamp", action="store_true", help="make format 2 of format 1")
    parsed = parser.parse_args()
    if parsed.stamp:
        stamp_files(parsed.method)
        return
    make(parsed.project.resolve(), parsed.method, parsed.format, parsed.record)


if __name__ == "__main__":
    main()
