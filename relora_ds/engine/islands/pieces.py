"""Pieces: which elements of a rank's slices of masters travel together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from relora_ds.engine.zero.layout import Layout
from relora_ds.numerics.codes.wire_codes import BLOCK
from relora_ds.parallel.fragments import share_out
from relora_ds.parallel.shape import shard_of

_STRETCH = 1 << 24
"""Elements of a piece at most; it bounds what an exchange adds on the device."""
assert _STRETCH % BLOCK == 0, "codes of pieces are the code of the whole"

Stretch = tuple[int, int, int]
"""Number of the tensor in the order of `Layout.owners`, first element, and how many."""


@dataclass(frozen=True)
class Piece:
    """Some elements of the tensors that the optimizer steps on this rank, or of others like them.

    Args:
        stretches: where they lie, in order.
    """

    stretches: tuple[Stretch, ...]

    def take(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The elements, (N,): a live view if there is one stretch, else a copy."""
        parts = [tensors[n].narrow(0, first, count) for n, first, count in self.stretches]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put(self, tensors: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """Set the elements to (N,) values of any device and type."""
        at = 0
        for number, first, count in self.stretches:
            tensors[number].narrow(0, first, count).copy_(values.narrow(0, at, count))
            at += count


@dataclass(frozen=True)
class Fragment:
    """What travels at a time.

    Args:
        parameters: the same on every rank, in the same order.
        pieces: what this rank holds of them.
    """

    parameters: tuple[nn.Parameter, ...]
    pieces: tuple[Piece, ...]


def everything(layout: Layout) -> Fragment:
    """All that is trained, with the padding of flat tensors, in pieces of one stretch each."""
    pieces: list[Piece] = []
    for number, owner in enumerate(layout.owners()):
        pieces += _cut([(number, 0, owner.numel())])
    return Fragment(tuple(layout.placements), tuple(pieces))


def fragments(layout: Layout, names: Mapping[nn.Parameter, str], count: int) -> list[Fragment]:
    """The same in `count` parts, without padding: see `share_out`.

    Args:
        layout: where masters are.
        names: of all parameters of the model.
        count: of fragments; one has everything.
    """
    if count == 1:
        return [everything(layout)]
    number = {id(owner): n for n, owner in enumerate(layout.owners())}
    found = []
    for parameters in share_out({p: names[p] for p in layout.placements}, count):
        # tensor-parallel ranks must come to the same of what they hold alike: no block of a code
        # may have elements of what they do not
        pieces: list[Piece] = []
        for alike in (True, False):
            held = [layout.placements[p] for p in parameters if (shard_of(p) is None) == alike]
            pieces += _cut(
                [
                    (number[id(each.owner)], each.stretch.offset, each.stretch.length)
                    for each in held
                    if each.stretch.length
                ]
            )
        found.append(Fragment(tuple(parameters), tuple(pieces)))
    return found


def _cut(stretches: Sequence[Stretch]) -> Iterator[Piece]:
    """The stretches one after the other, cut after every `_STRETCH` elements."""
    piece, room = [], _STRETCH
    for number, first, count in stretches:
        while count:
            length = min(count, room)
            piece.append((number, first, length))
            first, count, room = first + length, count - length, room - length
            if not room:
                yield Piece(tuple(piece))
                piece, room = [], _STRETCH
    if piece:
        yield Piece(tuple(piece))
