"""What one rank has to write of a checkpoint: live values, each with the file it goes into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.record import RECORD, RunRecord, encode_record
from relora_ds.checkpoint.format.stamp import KEY as STAMP
from relora_ds.checkpoint.format.stamp import Origin, stamp
from relora_ds.checkpoint.restore import round_tensors, side_slices, side_tensors
from relora_ds.data.tokenizer import tokenizer_files
from relora_ds.engine.engine import TrainEngine
from relora_ds.files.durable import OutputFile
from relora_ds.files.tensors import stream_safetensors
from relora_ds.parallel.topology import Topology

_BLOCK = 1 << 20


class Content(Protocol):
    """What is in a file."""

    def write(self, file: OutputFile) -> None:
        """Append all of it."""
        ...

    def values(self) -> object:
        """The tensors in it, in any containers; they may be live."""
        ...

    def with_values(self, values: Any) -> Content:
        """The same kind of file with other values in place of `values`."""
        ...


@dataclass(frozen=True)
class Pickled:
    """What `torch.load` reads back: tensors in containers of plain values."""

    value: object

    def write(self, file: OutputFile) -> None:
        """Append it as `torch.save` does."""
        torch.save(self.value, cast(IO[bytes], file))

    def values(self) -> object:
        """The value."""
        return self.value

    def with_values(self, values: Any) -> Pickled:
        """A file of another value."""
        return Pickled(values)


@dataclass(frozen=True)
class Tensors:
    """Tensors by name, in safetensors' format."""

    tensors: Mapping[str, torch.Tensor]
    stamp: Mapping[str, str] = field(default_factory=dict)
    """Kept in the file's header."""

    def write(self, file: OutputFile) -> None:
        """Append them."""
        stream_safetensors(file, self.tensors, self.stamp)

    def values(self) -> object:
        """The tensors by name."""
        return dict(self.tensors)

    def with_values(self, values: Any) -> Tensors:
        """A file of other tensors."""
        return Tensors(values, self.stamp)


@dataclass(frozen=True)
class Copied:
    """What is in another file when this one is written."""

    path: Path

    def write(self, file: OutputFile) -> None:
        """Append it."""
        with self.path.open("rb") as source:
            while block := source.read(_BLOCK):
                file.write(block)

    def values(self) -> object:
        """No tensors."""
        return None

    def with_values(self, values: Any) -> Copied:
        """The same file."""
        return self


@dataclass(frozen=True)
class Described:
    """One of the files in which a checkpoint says what it is of, encoded when it is written."""

    record: RunRecord
    name: str

    def write(self, file: OutputFile) -> None:
        """Append it."""
        file.write(encode_record(self.record)[self.name])

    def values(self) -> object:
        """No tensors."""
        return None

    def with_values(self, values: Any) -> Described:
        """The same file."""
        return self


Contents = Mapping[str, Content]
"""Every file of a rank by name."""


def contents_of_rank(
    engine: TrainEngine,
    record: RunRecord,
    method_tensors: Mapping[str, torch.Tensor],
    tokenizer: Path | None,
    topology: Topology,
    origin: Origin,
) -> Contents:
    """What this rank writes of a checkpoint, live. A collective call.

    Args:
        engine: holds weights and optimizer state after `record.trainer.step` updates.
        record: what the checkpoint says of itself.
        method_tensors: of the method's state, as this tensor-parallel rank holds them.
        tokenizer: copied into the checkpoint.
        topology: the first rank writes what exists once, the first of each tensor-parallel place
            what all copies of the model share, and the first island what is common to all.
        origin: of the checkpoint, the same on every rank.
    """
    shards, contents = engine.shards(), dict[str, Content]()
    apart, name = round_tensors(engine, topology), layout.round_of_rank(topology.rank)
    if apart:
        contents[name] = Tensors(apart, stamp(name, origin))
    if topology.islands.rank > 0:
        return contents
    contents |= {n: Pickled({**value, STAMP: stamp(n, origin)}) for n, value in shards.items()}
    named = {layout.side_of_rank(topology.rank): side_slices(engine)}
    if topology.dp_rank == 0:
        named[layout.method(topology.tp.suffix)] = dict(method_tensors)
    named = {name: tensors for name, tensors in named.items() if tensors}
    if topology.dp_rank == 0:
        named[layout.side(topology.tp.suffix)] = side_tensors(engine)
    contents |= {n: Tensors(tensors, stamp(n, origin)) for n, tensors in named.items()}
    if topology.is_main:
        contents |= {name: Described(record, name) for name in RECORD}
        if tokenizer is not None:
            files = tokenizer_files(tokenizer)
            contents |= {name: Copied(path) for name, path in files.items()}
    return contents


def size_of(contents: Contents) -> int:
    """Bytes of the tensors in the files, without what their formats add."""
    storages: dict[int, int] = {}
    for content in contents.values():
        for tensor in tensors_in(content.values()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
