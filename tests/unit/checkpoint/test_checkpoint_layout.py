"""Names of a checkpoint's files: each one is known, and none is taken for another."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

from relora_ds.checkpoint.format import layout
from relora_ds.parallel.tensor import SINGLE, TensorParallel
from tests.golden.make_checkpoint import GOLDEN


@pytest.mark.parametrize("step", [0, 7, 100000])
def test_the_name_of_a_checkpoint_is_its_step(step: int) -> None:
    assert layout.step_of(layout.checkpoint(step)) == step


def test_what_is_not_complete_is_not_the_name_of_a_checkpoint(tmp_path: Path) -> None:
    final = tmp_path / layout.checkpoint(5)
    for path in (layout.staging(final), layout.stale(final), tmp_path / layout.LATEST):
        assert layout.step_of(path.name) is None
    layout.staging(final).mkdir()
    layout.stale(final).mkdir()
    final.mkdir()
    assert layout.unfinished(tmp_path) == [layout.staging(final)]
    assert layout.going(tmp_path) == [layout.stale(final)]


def test_every_rank_has_files_of_its_own() -> None:
    ranks = [SINGLE, *(TensorParallel(rank, 2) for rank in range(2))]
    names = [of(tp.suffix) for of in (layout.side, layout.method) for tp in ranks]
    names += [layout.side_of_rank(rank) for rank in range(2)]
    names += [layout.state(number) for number in range(2)]
    assert len(set(names)) == len(names)
    states = [name for name in names if fnmatch.fnmatch(name, layout.STATES)]
    assert states == [layout.state(0), layout.state(1)]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*_format_*")), ids=lambda path: path.name)
def test_what_was_written_has_these_names(path: Path) -> None:
    known = {layout.TRAINER, layout.RUN, layout.MODEL, layout.MANIFEST, layout.side("")}
    found = {file.name for file in path.iterdir() if file.suffix != ".pt"}
    assert found - {layout.method("")} == known
