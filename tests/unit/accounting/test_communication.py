"""The recorder of collectives, on a group of one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from relora_ds.accounting.collectives import CALLS, OPERATIONS, payload_of, wire_bytes
from relora_ds.accounting.recorder import CommunicationRecorder, StepBytes, Traffic, Volume

FLOATS = torch.zeros(6)
SHARD = torch.zeros(3)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def recorder(world: ProcessGroup) -> Iterator[CommunicationRecorder]:
    with CommunicationRecorder() as recorder:
        yield recorder


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("all_reduce", 2 * 3 / 4 * 100),
        ("all_gather", 3 / 4 * 100),
        ("reduce_scatter", 3 / 4 * 100),
        ("all_to_all", 3 / 4 * 100),
        ("broadcast", 100),
        ("reduce", 100),
        ("send", 100),
        ("recv", 0),
        ("barrier", 0),
    ],
)
def test_wire_bytes_are_those_of_a_ring(operation: str, expected: float) -> None:
    assert wire_bytes(operation, 100, 4) == expected
    assert wire_bytes(operation, 100, 1) == 0.0


def test_an_unknown_operation_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'allreduce': it must be one of all_gather, all_reduce"):
        wire_bytes("allreduce", 1, 2)


@pytest.mark.parametrize(
    ("method", "arguments", "keywords", "expected"),
    [
        ("allreduce", ([FLOATS],), {}, 24),
        ("allreduce", (), {"tensors": [FLOATS]}, 24),
        ("allreduce", (FLOATS,), {}, 24),
        ("allreduce_coalesced", ([FLOATS, SHARD],), {}, 36),
        ("_allgather_base", (FLOATS, SHARD), {}, 24),
        ("_allgather_base", (), {"output": FLOATS, "input": SHARD}, 24),
        ("allgather", ([[SHARD, SHARD]], [SHARD]), {}, 24),
        ("_reduce_scatter_base", (SHARD, FLOATS), {}, 24),
        ("reduce_scatter", ([SHARD], [[SHARD, SHARD]]), {}, 24),
        ("gather", ([], [SHARD]), {}, 24),
        ("gather_single", (), {"output": FLOATS, "input": SHARD}, 24),
        ("scatter", ([SHARD], []), {}, 24),
        ("alltoall_base", (FLOATS, FLOATS, [], []), {}, 24),
        ("barrier", (), {"opts": None}, 0),
    ],
)
def test_payload_is_the_whole_tensor_on_every_rank(
    method: str, arguments: tuple[object, ...], keywords: dict[str, object], expected: int
) -> None:
    dtype, payload = payload_of(CALLS[method], 2, arguments, keywords)
    assert payload == expected
    assert dtype == ("float32" if expected else "none")


def test_every_method_of_the_process_group_that_moves_data_is_known() -> None:
    moving = {
        name
        for name, method in vars(ProcessGroup).items()
        if "-> c10d::Work" in (getattr(method, "__doc__", None) or "")
    }
    without_data = {"_end_coalescing", "reconfigure"}
    assert moving - without_data <= CALLS.keys()
    assert {"allreduce", "broadcast", "barrier"} <= moving


def test_collectives_are_keyed_by_operation_group_dtype_and_phase(
    recorder: CommunicationRecorder, world: ProcessGroup
) -> None:
    with recorder.phase("backward"):
        dist.all_reduce(torch.ones(4, dtype=torch.bfloat16))
        dist.all_reduce(torch.ones(2, dtype=torch.bfloat16))
    recorder.name_group(world, "dp")
    dist.broadcast(tensor=torch.ones(1, dtype=torch.int64), src=0)
    assert recorder.volumes() == {
        Traffic("all_reduce", "world", 1, "bfloat16", "backward"): Volume(2, 12),
        Traffic("broadcast", "dp", 1, "int64", "control"): Volume(1, 8),
    }


def test_an_object_is_counted_by_its_tensors(recorder: CommunicationRecorder) -> None:
    dist.broadcast_object_list([{"a": 1}], src=0)
    volumes = {kind.dtype: volume for kind, volume in recorder.volumes().items()}
    assert volumes["int64"] == Volume(1, 8)
    assert volumes["uint8"].payload > 0


def test_a_step_leaves_out_what_surrounds_it(recorder: CommunicationRecorder) -> None:
    with recorder.phase("setup"):
        dist.all_reduce(torch.ones(100))
    for size in (3, 5):
        recorder.begin_step()
        for phase in ("forward", "backward", "step", "event"):
            with recorder.phase(phase):
                dist.all_reduce(torch.ones(size))
        dist.all_reduce(torch.ones(1))
        with recorder.phase("eval"):
            dist.all_reduce(torch.ones(100))
        with recorder.phase("checkpoint"):
            dist.barrier()
        assert recorder.step_bytes() == StepBytes(4 * size * 4 + 4, 0.0)
    assert sum(v.payload for v in recorder.volumes().values()) == 3 * 400 + 4 * (12 + 20) + 8
    recorder.reset()
    assert recorder.volumes() == {}


def test_phases_nest_and_end_with_an_error(recorder: CommunicationRecorder) -> None:
    with recorder.phase("step"):
        with recorder.phase("event"):
            dist.barrier()
        dist.barrier()
    with pytest.raises(RuntimeError), recorder.phase("step"):
        raise RuntimeError
    dist.barrier()
    assert [kind.phase for kind in recorder.volumes()] == ["event", "step", "control"]
    with pytest.raises(ValueError, match="'merge': it must be one of backward"):
        recorder.phase("merge")


def test_start_and_stop_are_idempotent_and_restore_everything(world: ProcessGroup) -> None:
    originals = {name: vars(ProcessGroup).get(name) for name in CALLS}
    recorder = CommunicationRecorder()
    recorder.stop()
    for _ in range(2):
        recorder.start()
    dist.all_reduce(torch.ones(1))
    with pytest.raises(RuntimeError, match="stop it first"):
        CommunicationRecorder().start()
    for _ in range(2):
        recorder.stop()
    assert {name: vars(ProcessGroup).get(name) for name in CALLS} == originals
    dist.all_reduce(torch.ones(1))
    assert [volume.calls for volume in recorder.volumes().values()] == [1]
    with recorder:
        dist.all_reduce(torch.ones(1))
    assert [volume.calls for volume in recorder.volumes().values()] == [2]


def test_other_threads_count_in_the_phase_of_the_process(recorder: CommunicationRecorder) -> None:
    groups = [dist.new_group([0]) for _ in range(4)]

    def reduce(group: ProcessGroup) -> None:
        for _ in range(200):
            dist.all_reduce(torch.ones(1), group=group)

    with recorder.phase("backward"):
        threads = [threading.Thread(target=reduce, args=(group,)) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recorder.volumes() == {
        Traffic("all_reduce", "world", 1, "float32", "backward"): Volume(800, 3200)
    }


def test_a_collective_that_fails_raises_as_it_did(recorder: CommunicationRecorder) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        dist.all_gather_into_tensor(torch.zeros(5), torch.zeros(3))


def test_wire_bytes_are_defined_for_every_counted_method() -> None:
    assert all(wire_bytes(operation, 8, 2) >= 0 for operation in OPERATIONS)
