"""Every command of README and documentation does what it says, on a small model.

Tools run as they are written. Training is checked by a dry run, which reads all that a run names;
the first one of the README trains, for a few steps. What needs another machine, the network or
minutes is listed here with the test that stands for it, and nothing else is left out.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from relora_ds.cli.main import VERBS, main
from tests.conftest import TinyCorpus
from tests.docs.commands import Command, commands
from tests.harness.descriptions import describe, write_model
from tests.harness.run import run, write_run
from tests.unit.cli.test_main import SCRIPTS

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "configs/*.md")
    for path in ROOT.glob(pattern)
    if commands(path)
)
ELSEWHERE = {
    r"bash launch/quickstart\.sh": "tests/distributed/test_single_node.py",
    r"bash launch/test\.sh": "the suite itself",
    r"bash launch/gpu_report\.sh \w+": "tests/distributed/test_gpu_report.py",
    r"bash tools/gpu_wheels\.sh": "downloads gigabytes",
    r"bash launch/multi_node\.sh .*": "tests/multihost/test_launch.py",
    r"\. (\.venv/bin/activate|launch/environment\.sh)": "tests/unit/test_launch_environment.py",
    r"pip install .*": "tests/unit/test_packaging.py",
    r"python launch/pretrain\.py configs/run/\w+\.yaml --dry-run": (
        "tests/unit/config/test_shipped_configs.py"
    ),
    r"python tools/prepare_data\.py --dataset .*": "needs the package datasets and a data set",
    r"python tools/evaluate\.py .*--lm-eval .*": "tests/unit/train/test_lm_eval.py",
    r"python tools/finetune\.py .*": "tests/unit/train/glue/test_glue.py",
    r"python tools/doctor\.py --hostfile .*": "tests/unit/planning/doctor/test_doctor.py",
    r".*benchmarks/step\.py --against .*": "tests/unit/benchmarks/test_authors_layers.py",
    r"(OMP_NUM_THREADS=1 )?python benchmarks/[\w/]+\.py.*": "minutes: test_benchmarks, slow",
    r"torchrun .* benchmarks/\w+\.py .*": "minutes: test_benchmarks, slow",
}
"""Commands that are not executed here, with what stands for them."""
SHORT = (
    "train.steps=3",
    "train.seq_length=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "method.warm_start_steps=1",
    "method.merge_every=1",
    "method.restart_warmup_steps=0",
    "schedule.warmup_steps=0",
    "eval.batches=1",
    "checkpoint.every=0",
)
"""What makes seconds of the README's first run."""
NOT_THERE = ("checkpoint.resume=runs/base/checkpoints/step_900",)
"""Overrides that a dry run cannot follow: the run would have to be there."""
TOOLS = {script: verb for verb, script in SCRIPTS.items() if script.startswith("tools/")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: TinyCorpus) -> Path:
    """A folder in which the names that the documents use mean something small."""
    world = tmp_path_factory.mktemp("world")
    method = {"name": "relora", "rank": 4, "merge_every": 3, "restart_warmup_steps": 1}
    description = describe(world, method, 2, tiny_corpus.files)
    write_model(world, max_position_embeddings=256)
    description["output_dir"] = str(world / "runs" / "mine")
    write_run(description, world / "RUN.yaml")
    code, output = run([str(world / "RUN.yaml")])
    assert code == 0, output
    for name in ("relora", "full"):
        shutil.copytree(world / "runs" / "mine", world / "runs" / name)
    for name in ("my_model", "Llama-3.2-1B"):
        shutil.copytree(world / "runs" / "mine" / "hf", world / name)
    shutil.copytree(world / "runs" / "mine" / "hf", world / "runs" / "quickstart" / "hf")
    (world / "data").mkdir()
    for name in ("train", "valid", "other", "c4_valid"):
        for suffix in (".bin", ".idx", ".json"):
            source = tiny_corpus.train if name == "train" else tiny_corpus.valid
            shutil.copy(f"{source}{suffix}", world / "data" / f"{name}{suffix}")
    shutil.copy(tiny_corpus.text, world / "corpus.txt")
    (world / "heldout.txt").write_text(tiny_corpus.text.read_text()[:8000])
    for name in ("configs", "launch", "tools", "benchmarks"):
        (world / name).symlink_to(ROOT / name)
    return world


@pytest.fixture
def world(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which a page's commands may change."""
    shutil.copytree(trained, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def _elsewhere(command: Command) -> bool:
    return any(re.fullmatch(pattern, command.text) for pattern in ELSEWHERE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands(page: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(page):
        if not _elsewhere(command):
            _execute(command, world, monkeypatch)


def _execute(command: Command, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, script = command.arguments, command.script
    if script in TOOLS:
        if script == "tools/train_tokenizer.py":  # the corpus here is too small for so many
            arguments = [re.sub(r"^8000$", "512", each) for each in arguments]
        more = ["--no-meeting"] if script == "tools/doctor.py" else []
        assert main([TOOLS[script], *arguments, *more]) == 0, command.text
    elif script == "launch/pretrain.py" or command.words[:2] == ["relora-ds", "train"]:
        _train(command, world, monkeypatch)
    elif command.words[0] == "relora-ds" and command.words[1] in VERBS:
        assert main(command.words[1:]) == 0, command.text
    else:
        pytest.fail(f"no test executes `{command.text}`: add it here or to ELSEWHERE")


def _train(command: Command, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relora_ds.train.main import main as train

    given = command.arguments[1:] if command.script is None else command.arguments
    arguments = [each for each in given if each not in NOT_THERE]
    if "output_dir=runs/mine" in arguments:
        shutil.rmtree(world / "runs" / "mine")
        small = [each.replace("llama_9m", "llama_quickstart") for each in arguments]
        code, output = run([*_below(world, small), *SHORT])
        assert code == 0, output
        return
    files: list[Any] = [] if "RUN.yaml" in arguments else ["data={source: builtin}"]
    asked = [] if "--dry-run" in arguments else ["--dry-run"]
    assert train([*arguments, *files, *asked]) == 0, command.text


def _below(world: Path, arguments: list[str]) -> list[str]:
    """Arguments whose paths lead into the folder: the run's process starts in the checkout."""
    paths = ("output_dir", "data.train", "data.valid", "data.tokenizer")
    changed = (each.partition("=") for each in arguments)
    return [
        f"{key}={world / value}" if key in paths else key + sign + value
        for key, sign, value in changed
    ]


def test_what_is_left_out_is_still_in_a_page() -> None:
    every = [command.text for page in PAGES for command in commands(page)]
    for pattern in ELSEWHERE:
        used = any(re.fullmatch(pattern, text) for text in every)
        assert used or "multi_node" in pattern, f"no page has {pattern} any more"


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize(
    "command",
    sorted(
        c.text
        for c in {c for page in PAGES for c in commands(page)}
        if "benchmarks/" in c.text and "--against" not in c.arguments  # others' code is not here
    ),
    ids=lambda text: text.partition("benchmarks/")[2],
)
def test_benchmarks(command: str) -> None:
    parsed = Command(command)
    assert parsed.script is not None
    processes = 2 if parsed.words[0] == "torchrun" else 1
    code, output = run(parsed.arguments, processes, parsed.script, timeout_s=1800)
    assert code == 0, output
