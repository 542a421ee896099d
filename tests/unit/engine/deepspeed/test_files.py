"""What DeepSpeed's files may hold: nothing in one is run, and a hostile one is one clear error."""

from __future__ import annotations

import collections
import datetime
import os
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from relora_ds.engine.deepspeed.checkpoint_engine import TensorFiles
from relora_ds.engine.deepspeed.files import open_shard, read_shard, shard_files
from relora_ds.errors import CheckpointError
from tests.golden.make_checkpoint import checkpoint


class Runs:
    """Makes a file by a shell command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._witness}",)


class Rebuilt:
    """A tensor of any shape over three floats of memory."""

    def __init__(self, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        storage = torch.zeros(3).untyped_storage()
        self._memory = torch.storage.TypedStorage(
            wrap_storage=storage, dtype=torch.float32, _internal=True
        )
        self._shape, self._stride = shape, stride

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self._memory, 0, self._shape, self._stride, False, {})
        return _rebuild_tensor_v2, arguments


def itself() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def doubling(times: int) -> list[Any]:
    """A few lists that a reader without memory would take for 2**times."""
    value: list[Any] = [1]
    for _ in range(times):
        value = [value, value]
    return value


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_code_is_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "it_ran"
    path = save(tmp_path / "shard.pt", {"module": {}, "extra": [Runs(witness)]})
    for read in (open_shard, read_shard, lambda given: TensorFiles().load(str(given))):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert f"{path}: holds posix.system, which is code and no tensor" in str(caught.value)
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists()  # the file is what it is taken for


def test_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "it_ran"
    path = tmp_path / "shard.pt"
    path.write_bytes(pickle.dumps(Runs(witness)))
    with pytest.raises(CheckpointError, match=r"shard\.pt: cannot be read \(File is not a zip"):
        open_shard(path)
    assert not witness.exists()


CONTENTS: dict[str, tuple[Any, str]] = {
    "no dictionary": ([1], "holds list instead of a dictionary"),
    "a date": ({"a": datetime.date(2020, 1, 1)}, r"holds datetime\.date"),
    "an array": ({"a": np.zeros(3)}, r"holds numpy.*numpy\.dtype"),
    "bytes": ({"a": b"x"}, "holds bytes, which is no plain value"),
    "a counter": ({"a": collections.Counter("x")}, r"holds collections\.Counter"),
    "more than its memory": ({"a": Rebuilt((10**12,), (1,))}, "not resizable"),
    "repeats without memory": ({"a": Rebuilt((10**12,), (0,))}, "with less memory than that"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "without ordinary memory"),
    "no memory": ({"a": torch.zeros(3, device="meta")}, "without ordinary memory"),
    "a list in itself": ({"a": itself()}, "nested deeper"),
    "lists of the same": ({"a": doubling(28)}, "nested deeper"),
    "lists in lists": ({"a": nested(100)}, "nested deeper"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_are_refused(tmp_path: Path, case: str) -> None:
    content, words = CONTENTS[case]
    path = save(tmp_path / "shard.pt", content)
    with pytest.raises(CheckpointError, match=rf"shard\.pt: .*{words}"):
        open_shard(path)


def golden() -> Path:
    return next(checkpoint("relora", 1).glob("*_optim_states.pt"))


def rezip(path: Path, compression: int, twice: bool = False) -> None:
    with zipfile.ZipFile(golden()) as source, zipfile.ZipFile(path, "w", compression) as target:
        names = source.namelist()
        for name in names:
            target.writestr(name, source.read(name))
        if twice:
            with pytest.warns(UserWarning, match="Duplicate name"):
                target.writestr(names[-1], b"")


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    """They may be a thousand times as large as they look."""
    rezip(tmp_path / "shard.pt", zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed records"):
        open_shard(tmp_path / "shard.pt")


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    rezip(tmp_path / "shard.pt", zipfile.ZIP_STORED, twice=True)
    with pytest.raises(CheckpointError, match="two records of one name"):
        open_shard(tmp_path / "shard.pt")


def test_sizes_beyond_the_file_are_refused(tmp_path: Path) -> None:
    content = bytearray(golden().read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (0x7FFFFFFF).to_bytes(4, "little")
    (tmp_path / "shard.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="claims records that are larger than the file"):
        open_shard(tmp_path / "shard.pt")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "link.pt").symlink_to(golden())
    before = time.monotonic()
    for name in ("pipe.pt", "folder.pt", "link.pt"):
        with pytest.raises(CheckpointError, match=f"{name}: .*is not a regular file"):
            open_shard(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"none\.pt: cannot be read \(No such file"):
        open_shard(tmp_path / "none.pt")
    assert time.monotonic() - before < 60


@pytest.mark.parametrize("damage", range(20))
def test_damaged_files(tmp_path: Path, damage: int) -> None:
    """Bytes of the archive's end, of the pickle and of nothing in particular."""
    content = bytearray(golden().read_bytes())
    draw = np.random.default_rng(damage)
    if damage % 4 == 0:
        content = content[: int(draw.integers(len(content)))]
    places = draw.integers(0, len(content) or 1, 60 if damage % 4 else 0)
    ends = (len(content) - draw.integers(1, 2000, 60)) if damage % 4 == 2 else places
    for at in ends.tolist():
        content[at] ^= int(draw.integers(1, 256))
    path = tmp_path / "shard.pt"
    path.write_bytes(content)
    said = f"{path}: is as it was where it matters"
    try:
        read_shard(path)
    except CheckpointError as error:
        said = str(error)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said


def test_what_is_read_outlives_the_file(tmp_path: Path) -> None:
    path = save(
        tmp_path / "shard.pt", {"module": {"a": torch.arange(5.0)}, "b": torch.ones(3).bool()}
    )
    found = read_shard(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert found["module"]["a"].tolist() == [0, 1, 2, 3, 4]
    assert found["b"].all()


def test_a_module_does_not_take_the_tensors_themselves(tmp_path: Path) -> None:
    state = collections.OrderedDict(weight=torch.ones(2, 2), bias=torch.ones(2))
    state._metadata = {"": {"assign_to_params_buffers": True}}  # type: ignore[attr-defined]
    found = read_shard(save(tmp_path / "shard.pt", {"module": state}))
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight
    layer.load_state_dict(found["module"])
    assert layer.weight is weight


@pytest.mark.parametrize(("method", "number"), [("relora", 1), ("switchlora", 0)])
def test_names_of_what_was_written(method: str, number: int) -> None:
    found = {path.name for path in checkpoint(method, number).glob("*.pt")}
    assert set(shard_files(2, 1, 1, torch.bfloat16)) == found


def test_names_by_topology() -> None:
    names = {stage: set(shard_files(stage, 2, 2, torch.float32)) for stage in range(4)}
    assert names[0] == {"mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"}
    assert len(names[1]) == len(names[2]) == 2 + 4
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt" in names[1]
    assert len(names[3]) == 8
    assert "zero_pp_rank_0_mp_rank_01_model_states.pt" in names[3]
