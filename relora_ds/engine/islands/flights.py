"""Fragments on their way between islands, and how a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from relora_ds.engine.islands.pieces import Fragment
from relora_ds.parallel.islands import Awaited


@dataclass
class Flight:
    """A fragment on its way.

    Args:
        number: of the fragment.
        left: updates of the run when it left.
        sent: values of this rank's masters then, by piece; (N,) fp32 on the host.
        awaited: what is still on its way, by piece.
        means: over islands, of what has arrived, by piece; (N,) fp32 on the host.
    """

    number: int
    left: int
    sent: list[torch.Tensor]
    awaited: list[Awaited] = field(default_factory=list)
    means: list[torch.Tensor] = field(default_factory=list)


def packed(
    flights: Sequence[Flight], fragments: Sequence[Fragment], owners: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Flights that have arrived as tensors by name, each as large as its owner.

    Args:
        flights: no two of one fragment.
        fragments: all of them.
        owners: tensors of the owners' sizes on the host.
    """
    sent, mean = ([torch.zeros_like(owner) for owner in owners] for _ in range(2))
    left = torch.full((len(fragments),), -1)
    for flight in flights:
        left[flight.number] = flight.left
        for piece, *values in zip(
            fragments[flight.number].pieces, flight.sent, flight.means, strict=True
        ):
            for tensors, value in zip((sent, mean), values, strict=True):
                piece.put(tensors, value)
    kinds = {"sent": sent, "mean": mean}
    found = {f"{kind}.{n}": each for kind, all_ in kinds.items() for n, each in enumerate(all_)}
    return found | {"left": left}


def landed(state: Mapping[str, torch.Tensor], fragments: Sequence[Fragment]) -> list[Flight]:
    """The flights that were `packed`, in the order in which they left."""
    count = sum(name.startswith("sent.") for name in state)
    sent, mean = ([state[f"{kind}.{n}"] for n in range(count)] for kind in ("sent", "mean"))
    flights = []
    for number, left in enumerate(state["left"].tolist()):
        if left >= 0:
            pieces = fragments[number].pieces
            values = ([piece.take(kind).clone() for piece in pieces] for kind in (sent, mean))
            flights.append(Flight(number, left, next(values), means=next(values)))
    return sorted(flights, key=lambda flight: (flight.left, flight.number))
