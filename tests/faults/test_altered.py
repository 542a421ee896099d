"""A checkpoint that is not what was written is refused at resume, by name, and never trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import TinyCorpus
from tests.faults import moments as at
from tests.faults import runs
from tests.harness.faults import Fault, Kill
from tests.harness.jobs import run_job
from tests.harness.outcome import lines

pytestmark = pytest.mark.distributed

_NEWEST, _MODEL = "step_20", "mp_rank_00_model_states.pt"
_OPTIMIZER = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def broken(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run that was killed with two checkpoints behind it."""
    run = runs.write("relora", tiny_corpus, tmp_path_factory.mktemp("altered"))
    end = run_job(run.arguments(), Fault(at.AFTER_LINE, Kill("job"), step=22))
    assert end.struck
    return run


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def _write(text: str, path: Path) -> None:
    path.write_text(text)


def _copy_as_rank_7(path: Path) -> None:
    shutil.copy(path, path.with_name(path.name.replace("rank_1", "rank_7")))


_ALTERATIONS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights cut": (f"{_NEWEST}/{_MODEL}", _cut, _MODEL),
    "moments cut": (f"{_NEWEST}/{_OPTIMIZER}", _cut, _OPTIMIZER),
    "weights flipped": (f"{_NEWEST}/{_MODEL}", _flip, _MODEL),
    "moments flipped": (f"{_NEWEST}/{_OPTIMIZER}", _flip, _OPTIMIZER),
    "clocks flipped": (f"{_NEWEST}/side.safetensors", _flip, "side.safetensors"),
    "record flipped": (f"{_NEWEST}/trainer.json", _flip, "trainer.json"),
    "manifest missing": (f"{_NEWEST}/manifest.json", Path.unlink, "manifest.json"),
    "shard missing": (f"{_NEWEST}/{_OPTIMIZER}", Path.unlink, _OPTIMIZER),
    "stale shard": (f"{_NEWEST}/{_OPTIMIZER}", _copy_as_rank_7, "rank_7"),
    "latest missing": ("latest", Path.unlink, "latest"),
    "latest empty": ("latest", partial(_write, ""), "latest"),
    "latest outside": ("latest", partial(_write, "../step_20"), "latest"),
    "latest lost": ("latest", partial(_write, "step_99"), "latest"),
}


@pytest.mark.parametrize("case", _ALTERATIONS)
def test_an_altered_checkpoint_is_refused_by_name(
    case: str, broken: runs.Run, tmp_path: Path
) -> None:
    file, alter, name = _ALTERATIONS[case]
    copy = tmp_path / "run"
    shutil.copytree(broken.output_dir, copy)
    before = lines(copy)
    alter(copy / "checkpoints" / file)
    end = run_job(broken.arguments(f"output_dir={copy}"))
    assert end.code == 4, end.said
    assert name in end.said
    assert "Traceback" not in end.said
    assert lines(copy) == before, "nothing was trained, and nothing moved away"


def test_the_older_checkpoint_is_taken_where_that_is_allowed(
    broken: runs.Run, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(broken.output_dir, copy)
    _flip(copy / "checkpoints" / _NEWEST / _MODEL)
    end = run_job(broken.arguments(f"output_dir={copy}", "checkpoint.fallback=true"))
    assert end.code == 0, end.said
    assert "step_16" in end.said
