"""Slices of matrices to the rank that owns each, and back.

What two ranks exchange in one direction is one message, whatever number of matrices is in it.
Lengths are known beforehand, so nothing but values travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import P2POp, ProcessGroup


@dataclass(frozen=True)
class Wholes:
    """Who holds what of the matrices that one group of ranks has in slices.

    Args:
        group: the ranks.
        held: of a matrix, by its name: the elements that each rank holds, and the rank within the
            group that owns it.
    """

    group: ProcessGroup
    held: Mapping[str, tuple[Sequence[int], int]]

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return torch.distributed.get_rank(self.group)

    def owns(self, name: str) -> bool:
        """Whether this process owns a matrix among the ranks of the group."""
        return self.held[name][1] == self.rank

    def gather(self, slices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole matrices on their owners. A collective call.

        Args:
            slices: this rank's, 1-D and of one dtype, of matrices that all ranks name alike and in
                the same order.

        Returns:
            Those that this rank owns, 1-D.
        """
        if not slices:
            return {}
        names = list(slices)
        out = {
            rank: [slices[name] for name in names if self.held[name][1] == rank]
            for rank in self._others()
        }
        mine = [name for name in names if self.held[name][1] == self.rank]
        sizes = {rank: [self.held[name][0][rank] for name in mine] for rank in self._others()}
        found = self._exchange(out, sizes, slices.values())
        wholes = {}
        for number, name in enumerate(mine):
            parts = [
                slices[name] if rank == self.rank else found[rank][number]
                for rank in range(len(self.held[name][0]))
            ]
            wholes[name] = torch.cat(parts)
        return wholes

    def scatter(
        self, wholes: Mapping[str, torch.Tensor], slices: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Slices of whole matrices to the ranks that hold them. A collective call.

        Args:
            wholes: those that this rank owns, 1-D.
            slices: what `gather` got, for names and kinds of tensors.

        Returns:
            This rank's slices by name, 1-D.
        """
        if not slices:
            return {}
        cut = {name: whole.split(list(self.held[name][0])) for name, whole in wholes.items()}
        out = {rank: [cut[name][rank] for name in wholes] for rank in self._others()}
        owned = {
            rank: [name for name in slices if self.held[name][1] == rank] for rank in self._others()
        }
        sizes = {
            rank: [self.held[name][0][self.rank] for name in names] for rank, names in owned.items()
        }
        found = self._exchange(out, sizes, slices.values())
        result = {name: parts[self.rank] for name, parts in cut.items()}
        for rank, names in owned.items():
            result |= dict(zip(names, found[rank], strict=True))
        return {name: result[name] for name in slices}

    def spread(
        self, wholes: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Matrices as their owners have them, whole on every rank. A collective call.

        Args:
            wholes: those that this rank owns, among others.
            like: all of them, for names, shapes and kinds of tensors.

        Returns:
            All of them, shaped as in `like`.
        """
        if not like:
            return {}
        mine = {name: wholes[name].reshape(-1) for name in like if self.owns(name)}
        out = {rank: list(mine.values()) for rank in self._others()}
        owned = {rank: [n for n in like if self.held[n][1] == rank] for rank in self._others()}
        sizes = {rank: [like[name].numel() for name in names] for rank, names in owned.items()}
        found = self._exchange(out, sizes, like.values())
        result = dict(mine)
        for rank, names in owned.items():
            result |= dict(zip(names, found[rank], strict=True))
        return {name: result[name].view_as(each) for name, each in like.items()}

    def _others(self) -> list[int]:
        size = torch.distributed.get_world_size(self.group)
        return [rank for rank in range(size) if rank != self.rank]

    def _exchange(
        self,
        out: Mapping[int, Sequence[torch.Tensor]],
        sizes: Mapping[int, Sequence[int]],
        like: Iterable[torch.Tensor],
    ) -> dict[int, Sequence[torch.Tensor]]:
        """Send tensors to each rank and receive tensors of known sizes from it."""
        example = next(iter(like))
        operations, received = [], {}
        for rank in self._others():
            peer = torch.distributed.get_global_rank(self.group, rank)
            sent = [tensor for tensor in out[rank] if tensor.numel()]
            if sent:
                message = torch.cat(sent)
                operations.append(P2POp(torch.distributed.isend, message, peer, self.group))
            received[rank] = example.new_empty(sum(sizes[rank]))
            if received[rank].numel():
                operations.append(P2POp(torch.distributed.irecv, received[rank], peer, self.group))
        if operations:
            for work in torch.distributed.batch_isend_irecv(operations):
                work.wait()
        return {rank: received[rank].split(list(sizes[rank])) for rank in received}
