"""What one collective moves: its operation, its payload and its bytes on the wire. Pure.

Payload is the size of the whole logical tensor, the same on every rank of the group:

| operation        | payload                                                   | wire, per rank  |
|------------------|-----------------------------------------------------------|-----------------|
| `all_reduce`     | the tensor S                                              | 2 (n - 1) / n S |
| `all_gather`     | the gathered tensor, not this rank's shard                | (n - 1) / n S   |
| `reduce_scatter` | the tensor before it is scattered, not the shard          | (n - 1) / n S   |
| `gather`         | all shards together                                       | (n - 1) / n S   |
| `scatter`        | all shards together                                       | (n - 1) / n S   |
| `all_to_all`     | what this rank hands out, its own part included           | (n - 1) / n S   |
| `broadcast`      | the tensor; of an object, its pickle and that one's size  | S               |
| `reduce`         | the tensor                                                | S               |
| `send`           | the tensor                                                | S               |
| `recv`           | the tensor                                                | 0               |
| `barrier`        | 0                                                         | 0               |

Wire bytes are those of ring algorithms on n ranks, so that a reduce-scatter and an all-gather of S
cost what an all-reduce of S does. What a library really sends may differ: gloo carries a
reduce-scatter out as an all-reduce. A group of one rank sends nothing; its payload is counted all
the same, because the library is called all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Call(NamedTuple):
    """How to read a call of a `ProcessGroup` method."""

    operation: str
    position: int
    """Place of the argument that shows the payload."""
    keywords: tuple[str, ...]
    """Its names, where it is not passed by position."""
    shards: bool = False
    """It is this rank's share: the payload is one such share per rank."""


_TENSORS = ("tensors", "tensor")
_OUTPUTS = ("output_tensors", "output_lists", "outputs", "output")
_INPUTS = ("input_tensors", "inputs", "inputTensor", "input")
_SHARD = ("input_tensors", "input_tensor", "input")

CALLS: dict[str, Call] = {
    "allreduce": Call("all_reduce", 0, _TENSORS),
    "allreduce_coalesced": Call("all_reduce", 0, _TENSORS),
    "broadcast": Call("broadcast", 0, _TENSORS),
    "reduce": Call("reduce", 0, _TENSORS),
    "allgather": Call("all_gather", 0, _OUTPUTS),
    "allgather_coalesced": Call("all_gather", 0, _OUTPUTS),
    "allgather_into_tensor_coalesced": Call("all_gather", 0, _OUTPUTS),
    "_allgather_base": Call("all_gather", 0, _OUTPUTS),
    "all_gather_single": Call("all_gather", 0, _OUTPUTS),
    "all_gather_single_coalesced": Call("all_gather", 0, _OUTPUTS),
    "reduce_scatter": Call("reduce_scatter", 1, _INPUTS),
    "reduce_scatter_tensor_coalesced": Call("reduce_scatter", 1, _INPUTS),
    "_reduce_scatter_base": Call("reduce_scatter", 1, _INPUTS),
    "reduce_scatter_single": Call("reduce_scatter", 1, _INPUTS),
    "reduce_scatter_single_coalesced": Call("reduce_scatter", 1, _INPUTS),
    # only the root holds every share
    "gather": Call("gather", 1, _SHARD, shards=True),
    "gather_single": Call("gather", 1, _SHARD, shards=True),
    "gather_into_tensor": Call("gather", 1, _SHARD, shards=True),
    "scatter": Call("scatter", 0, ("output_tensors", "output_tensor"), shards=True),
    "alltoall": Call("all_to_all", 1, _INPUTS),
    "alltoall_base": Call("all_to_all", 1, _INPUTS),
    "all_to_all_single": Call("all_to_all", 1, _INPUTS),
    "send": Call("send", 0, _TENSORS),
    "recv": Call("recv", 0, _TENSORS),
    "recv_anysource": Call("recv", 0, _TENSORS),
    "barrier": Call("barrier", -1, ()),
    "monitored_barrier": Call("barrier", -1, ()),
}
"""Every method of torch's `ProcessGroup` that moves data, old and new names alike."""

OPERATIONS = frozenset(call.operation for call in CALLS.values())

_WHOLE_TENSOR = frozenset({"broadcast", "reduce", "send"})
_SHARED_OUT = frozenset({"all_gather", "reduce_scatter", "gather", "scatter", "all_to_all"})


def payload_of(
    call: Call, size: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str, int]:
    """dtype and payload bytes of a call on a group of `size` ranks; reads no tensor's values."""
    if call.position < 0:
        return "none", 0
    tensors = _tensors(_argument(call, args, kwargs))
    if not tensors:
        return "none", 0
    # a loop, not sum() over a generator: this runs at every collective of a step
    held = 0
    for tensor in tensors:
        held += tensor.numel() * tensor.element_size()
    return str(tensors[0].dtype).removeprefix("torch."), held * size if call.shards else held


def wire_bytes(operation: str, payload: int, size: int) -> float:
    """Bytes that a rank sends for `payload` bytes by ring algorithms on `size` ranks.

    Raises:
        ValueError: the operation is not one of `OPERATIONS`.
    """
    if operation not in OPERATIONS:
        raise ValueError(
            f"unknown collective {operation!r}: it must be one of {', '.join(sorted(OPERATIONS))}"
        )
    if size <= 1:
        return 0.0
    if operation == "all_reduce":
        return 2 * (size - 1) * payload / size
    if operation in _SHARED_OUT:
        return (size - 1) * payload / size
    return float(payload) if operation in _WHOLE_TENSOR else 0.0


class Wire(NamedTuple):
    """Bytes that a rank sends by kind of link."""

    near: float
    """Within its node."""
    far: float
    """To another node."""


def wire_by_link(operation: str, payload: int, size: int, per_node: int) -> Wire:
    """`wire_bytes` of a collective on nodes of `per_node` ranks, carried out within nodes first.

    Each rank reduces or gathers its share of S among its node's n ranks, which sends (n - 1) / n S
    within the node, and exchanges S / n with the ranks in its place on the other nodes. The sum
    is that of one flat ring.

    Args:
        size: ranks, a multiple of `per_node` if there are more than one node of them.
    """
    whole = wire_bytes(operation, payload, size)
    if size <= per_node:
        return Wire(whole, 0.0)
    near = whole * size * (per_node - 1) / (per_node * (size - 1))
    return Wire(near, whole - near)


def _argument(call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if len(args) > call.position:
        return args[call.position]
    return next((kwargs[name] for name in call.keywords if name in kwargs), None)


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a tensor or in lists of them."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
