"""Starting and stopping the process group, under any launcher or none, and waits on the host.

Two kinds of waiting must not be mixed. A collective of a step runs on the devices and is bounded by
`train.timeout_minutes`. Work of one process alone (verifying, hashing, exporting, plotting) may
take longer than that, and must not sit in a device's queue: `barrier`, `broadcast_object`,
`gather_objects` and `any_rank` run on a group of their own, on the host.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch.distributed import ProcessGroup

from relora_ds.engine.accelerator import check_accelerator
from relora_ds.engine.deepspeed.process_group import join_process_group
from relora_ds.engine.device import communication_backend, take_device
from relora_ds.errors import CollectiveTimeoutError, ConfigError, ReloraError
from relora_ds.launched import check_meeting_place, read_launch
from relora_ds.parallel.topology import Topology

T = TypeVar("T")

_HOST_LIMIT = timedelta(days=1)
"""Until a wait on the host fails by itself: beyond any work, short of for ever."""

_RESOLVE_S = 60.0
"""For how long the name of a host may be unknown."""

_host: ProcessGroup | None = None

# gloo raises plain RuntimeError with the words of the operating system
_SIGNS_OF_LOSS = (
    "timed out",
    "timeout",
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "no route to host",
    "connection refused",
    "network is unreachable",
)


def start(timeout_minutes: float) -> Topology:
    """Join the process group that the launcher describes, or a group of one.

    Args:
        timeout_minutes: a collective that takes longer raises on every rank, whatever group it
            runs in.

    Returns:
        This process's place; it computes on GPU `local_rank`, or on the CPU where there is none or
        ``DS_ACCELERATOR=cpu``.

    Raises:
        ConfigError: this machine has GPUs that torch cannot use, or fewer than processes; what the
            launcher says is incomplete or no number; or the place where the ranks are to meet is
            taken, unknown or out of reach.
        CollectiveTimeoutError: some ranks did not come there in time.
    """
    check_accelerator()
    if "RANK" not in os.environ:
        _describe_single_process()
    launched = read_launch(os.environ)
    check_meeting_place(os.environ)
    device = take_device(launched.local_rank)
    _check_meeting_point(min(_RESOLVE_S, 60 * timeout_minutes))
    try:
        join_process_group(timedelta(minutes=timeout_minutes), communication_backend())
    except torch.distributed.DistError as error:
        raise _no_meeting(error) from error
    _open_host_group()
    return Topology(launched.rank, launched.world_size, launched.local_rank, device)


def stop() -> None:
    """Leave the process group; gloo aborts at interpreter exit if nobody does."""
    global _host
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    _host = None


def lost_peers(error: RuntimeError) -> bool:
    """Whether an error means that another process did not answer, or is no longer there."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS_OF_LOSS)


def rank() -> int:
    """This process's global rank."""
    return torch.distributed.get_rank()


def world_size() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size()


def barrier() -> None:
    """Wait for every process, however long one of them works on its host.

    Runs on the host and leaves the device's queue alone, so a process may hash, export or plot for
    an hour while the others wait here. No limit of a device's collective applies. A process that is
    lost ends the wait at once where its connection breaks; one that is stopped or out of reach is
    noticed by whoever watches the processes (`train.lifetime.deadline`), or after a day.
    """
    torch.distributed.barrier(group=_host_group())


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank. Waits for rank 0 like `barrier`.

    Args:
        value: anything that can be pickled; of other ranks it is ignored.
    """
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=_host_group())
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value on every rank, in the order of ranks. Waits for all like `barrier`.

    Args:
        value: anything that can be pickled; small, for every rank holds all of them.
    """
    values: list[T | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value, group=_host_group())
    return cast(list[T], values)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. Waits for all like `barrier`."""
    found = torch.tensor([int(flag)])
    operation = torch.distributed.ReduceOp.MAX
    torch.distributed.all_reduce(found, op=operation, group=_host_group())
    return bool(found.item())


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes, in place."""
    torch.distributed.all_reduce(value)
    return value.div_(torch.distributed.get_world_size())


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, in place."""
    torch.distributed.all_reduce(value)
    return value


def _check_meeting_point(patience_s: float) -> None:
    """Make sure that the host where the ranks are to meet has an address.

    Args:
        patience_s: a cluster may publish names a little after it has started processes.

    Raises:
        ConfigError: it has none.
    """
    host, deadline = os.environ["MASTER_ADDR"], time.monotonic() + patience_s
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the host {host}, where the ranks are to meet, has no known address "
                    f"({error.strerror}): correct MASTER_ADDR (--master_addr), or the hostfile"
                ) from error
        time.sleep(1.0)


def _no_meeting(error: Exception) -> ReloraError:
    """What keeps the ranks from meeting where the launcher told them to."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    text = str(error).lower()
    if "address already in use" in text or "eaddrinuse" in text:
        return ConfigError(
            f"port {port} of this machine is in use, so the ranks cannot meet there: choose "
            "another with --master_port (deepspeed, torchrun) or MASTER_PORT (launch scripts)"
        )
    unanswered = ("failed to connect", "connection refused", "while trying to connect")
    if any(words in text for words in unanswered):
        return ConfigError(
            f"nobody answers at {host}:{port}, where the ranks are to meet: rank 0 has to run "
            f"there, and the network has to let the others through ({_first_line(error)})"
        )
    return CollectiveTimeoutError(
        f"not all ranks came to {host}:{port} within train.timeout_minutes: see the output of "
        f"those that did not ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _open_host_group() -> None:
    """Create the group of `barrier` and its like: of all processes, on their hosts."""
    global _host
    # of all processes, so this one is a member
    _host = cast(ProcessGroup, torch.distributed.new_group(backend="gloo", timeout=_HOST_LIMIT))


def _host_group() -> ProcessGroup:
    assert _host is not None, "distributed.start comes first"
    return _host


def _describe_single_process() -> None:
    """Fill in what a launcher would have set, on a port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
