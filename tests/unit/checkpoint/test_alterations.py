"""Random damage to every kind of file of a checkpoint: refused by name, or without effect.

Refused means a `CheckpointError` that names a file of the checkpoint. Without effect means that all
that a run goes on from is what it was, to the last bit. Half of the damage is covered up by a
manifest that was written anew, as by somebody who edits a checkpoint on purpose; then a change of a
value inside a file is not damage but another checkpoint, and only what no writer can have written
has to be refused.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import write_manifest
from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint
from relora_ds.checkpoint.saved_run import open_saved_run
from relora_ds.errors import CheckpointError
from tests.golden.make_checkpoint import ROOT, checkpoint

Change = Callable[[Path, random.Random], object]
SEED = 20261128


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


class Marker:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 3, 50))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def grow(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 99)))


def zero(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.write_bytes(content)


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def swap(path: Path, draw: random.Random) -> None:
    other = draw.choice(sorted(path.parent.iterdir()))
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def copy(path: Path, draw: random.Random) -> None:
    names = [layout.state(0), "mp_rank_01_model_states.pt", layout.side_of_rank(1), "x.json"]
    shutil.copy(path, path.parent / draw.choice([name for name in names if name != path.name]))


def older(path: Path, draw: random.Random) -> None:
    source = checkpoint(path.parent.parent.name, 0) / path.name
    if source.is_file():
        shutil.copy(source, path)


def as_link(path: Path, draw: random.Random) -> None:
    target = path.parent.parent / f"target_{path.name}"
    path.rename(target)
    path.symlink_to(target)


def as_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def garbage(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.randrange(1, 4000)))


def code(path: Path, draw: random.Random) -> None:
    torch.save({"module": Marker(path.parent.parent / "executed")}, path)


ANY: tuple[Change, ...] = (
    *(flip, flip, flip, cut, empty, grow, zero, remove),
    *(swap, copy, older, as_link, as_folder, garbage, code),
)
"""Damage that the manifest does not know of."""
COVERED: tuple[Change, ...] = (cut, empty, remove, swap, copy, garbage, code)
"""Damage that stays one where the manifest is written anew."""


def content_of(path: Path) -> str:
    """SHA-256 of all that a run goes on from."""
    run, digest = open_saved_run(path), hashlib.sha256()
    state = run.state()
    items = [*state.tensors(), *state.clocks.items()]
    method = run.method_state()
    items += [(key, value) for key, value in method.items() if isinstance(value, torch.Tensor)]
    for name, tensor in sorted(items, key=lambda item: item[0]):
        values = tensor.contiguous().view(-1).view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())
    plain = {key: value for key, value in method.items() if not isinstance(value, torch.Tensor)}
    record = run.record
    described = record.trainer, record.config, record.architecture, sorted(plain.items())
    digest.update(repr(described).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Whole checkpoints of several kinds, and what is in them."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    previous = Path.cwd()
    os.chdir(ROOT)
    for name, source in {
        "relora": checkpoint("relora", 2),
        "reshaped": None,
    }.items():
        path = folder / name / "step_5"
        path.parent.mkdir()
        if source is None:
            reshape_checkpoint(checkpoint("switchlora", 0), path, dp_size=2, stage=3)
        else:
            shutil.copytree(source, path)
        found[name] = path, content_of(path)
    os.chdir(previous)
    return found


def alter(
    number: int, originals: dict[str, tuple[Path, str]], place: Path
) -> tuple[str, str | None, bool]:
    """Damage a copy; returns what was done, the refusal, and whether nothing changed."""
    draw = random.Random(f"{SEED} {number}")
    kind = draw.choice(sorted(originals))
    original, content = originals[kind]
    path = place / kind / "step_5"
    shutil.rmtree(place / kind, ignore_errors=True)
    shutil.copytree(original, path)
    covered = draw.random() < 0.4
    change = draw.choice(COVERED if covered else ANY)
    file = draw.choice(
        [p for p in sorted(path.iterdir()) if not covered or p.name != layout.MANIFEST]
    )
    change(file, draw)
    if covered and (path / layout.MANIFEST).is_file():
        try:
            write_manifest(path)
        except OSError:
            covered = False
    what = f"{number}: {kind}, {change.__name__} of {file.name}{', covered' if covered else ''}"
    try:
        return what, None, content_of(path) == content
    except CheckpointError as error:
        return what, str(error), False


@pytest.mark.parametrize(
    "numbers", [range(60), pytest.param(range(60, 560), marks=pytest.mark.slow)], ids=str
)
def test_damage_is_refused_or_changes_nothing(
    numbers: range, originals: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    silent, unnamed = [], []
    for number in numbers:
        what, refusal, same = alter(number, originals, tmp_path)
        if refusal is None and not same:
            silent.append(what)
        if refusal is not None and "step_5" not in refusal:
            unnamed.append(f"{what}: {refusal}")
    assert not list(tmp_path.rglob("executed")), "code in a checkpoint was run"
    assert not silent, silent
    assert not unnamed, unnamed
