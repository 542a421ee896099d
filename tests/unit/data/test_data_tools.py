"""The command-line tools: one JSON line, one line on failure, the promised exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from relora_ds.data.tokens import TokenFile

TOOLS = Path(__file__).parents[3] / "tools"


def run(tool: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / tool, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Lines on stderr, without what a CUDA build of torch says on a machine without a GPU."""
    return [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]


def test_from_text_to_tokens_in_any_folder(text_file: Path, tmp_path: Path) -> None:
    options = ("--vocab-size", 400, "--output", "tokenizer.model")
    trained = run("train_tokenizer.py", "--input", text_file, *options, folder=tmp_path)
    assert (trained.returncode, complaints(trained)) == (0, [])
    options = ("--tokenizer", "tokenizer.model", "--output", "data/corpus")
    prepared = run("prepare_data.py", "--input", text_file, *options, folder=tmp_path)
    assert (prepared.returncode, complaints(prepared)) == (0, [])
    report = json.loads(prepared.stdout)
    assert report["tokenizer_sha256"] == json.loads(trained.stdout)["sha256"]
    assert report["num_tokens"] == TokenFile(tmp_path / "data" / "corpus").num_tokens


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        ("train_tokenizer.py", ["--vocab-size", "400", "--output", "tokenizer.model"]),
        ("prepare_data.py", ["--tokenizer", "tokenizer.model", "--output", "corpus"]),
    ],
)
def test_exit_codes(tmp_path: Path, tool: str, options: list[str]) -> None:
    missing = run(tool, "--input", "missing.txt", *options, folder=tmp_path)
    assert missing.returncode == 3
    assert missing.stderr == "error: missing.txt: does not exist; name an existing text file\n"
    assert run(tool, *options, folder=tmp_path).returncode == 2
    usage = run(tool, "--help", folder=tmp_path)
    assert usage.returncode == 0
    assert f"python tools/{tool} --input" in usage.stdout
    assert not list(tmp_path.iterdir())
