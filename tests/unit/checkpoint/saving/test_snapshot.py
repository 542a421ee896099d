"""A snapshot is what was there, in memory of its own, and shares memory as the original did."""

from __future__ import annotations

import io
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from relora_ds.checkpoint.saving.contents import Pickled, Tensors, size_of, tensors_in
from relora_ds.checkpoint.saving.snapshot import HostBuffers, Snapshot

CPU = torch.device("cpu")


def live() -> dict[str, Any]:
    flat = torch.arange(10.0)
    module = OrderedDict(head=flat[:4].view(2, 2), tail=flat[4:], tied=flat[4:])
    vars(module)["_metadata"] = {"": {"version": 1}}
    noted = torch.ones(3)
    vars(noted)["ds_id"] = "0_20"
    state = {"step": torch.tensor(3), "moments": (noted, [flat.t()]), "name": "adam", "lr": 0.1}
    weight = nn.Parameter(torch.zeros(2), requires_grad=False)
    return {"module": module, "optimizer": state, "weight": weight, "same": state}


def pickled(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def copied(value: object, buffers: HostBuffers | None = None) -> Any:
    return (
        Snapshot({"file": Pickled(value)}, CPU, buffers or HostBuffers(CPU)).copy()["file"].values()
    )


def test_the_copy_is_written_to_the_same_bytes() -> None:
    value = live()
    before = pickled(value)
    copy = copied(value)
    value["module"]["head"].zero_()
    value["optimizer"]["lr"] = 0.2
    assert pickled(copy) == before
    assert pickled(value) != before


def test_what_is_no_tensor_may_change_at_once_and_tensors_once_they_are_copied() -> None:
    value = live()
    before = pickled(value)
    snapshot = Snapshot({"file": Pickled(value)}, CPU, HostBuffers(CPU))
    value["optimizer"]["lr"] = 0.2
    value["optimizer"]["moments"][1].clear()
    value["module"].pop("tail")
    held = threading.Thread(target=snapshot.hold)
    held.start()
    held.join(0.05)
    assert held.is_alive()
    copy = snapshot.copy()
    held.join(20)
    assert not held.is_alive()
    value["module"]["head"].zero_()
    assert pickled(copy["file"].values()) == before


def test_nobody_waits_for_a_copy_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = HostBuffers(CPU)
    snapshot = Snapshot({"file": Pickled(live())}, CPU, buffers)
    monkeypatch.setattr(buffers, "take", lambda nbytes: HostBuffers.take(buffers, 1 << 60))
    with pytest.raises(MemoryError, match="for a copy of the state"):
        snapshot.copy()
    snapshot.hold()


@dataclass
class Place:
    """As DeepSpeed's addresses of fragments are."""

    start: int
    of: Any = None


def test_objects_are_copied_with_all_they_hold() -> None:
    plain, deep = Place(3), Place(4, [torch.zeros(2)])
    found_plain, found_deep = copied([plain, deep])
    plain.start, deep.of[0][:] = 5, 1
    assert found_plain == Place(3)
    assert found_deep.start == 4
    assert torch.equal(found_deep.of[0], torch.zeros(2))


def test_memory_is_copied_once_for_all_files() -> None:
    flat = torch.arange(1000.0)
    contents = {"a": Pickled([flat[:10], flat[10:]]), "b": Tensors({"x": flat})}
    assert size_of(contents) == 4000
    snapshot = Snapshot(contents, CPU, HostBuffers(CPU)).copy()
    assert size_of(snapshot) == 4000
    found = [t for content in snapshot.values() for t in tensors_in(content.values())]
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
    assert len(found) == 3


def test_buffers_are_used_again_and_hold_one_snapshot() -> None:
    buffers, value = HostBuffers(CPU), torch.arange(100.0)
    first = copied(value, buffers)
    second = copied(value, buffers)
    assert first.data_ptr() != second.data_ptr()
    buffers.recycle()
    places = {copied(value + number, buffers).data_ptr() for number in range(2)}
    assert places == {first.data_ptr(), second.data_ptr()}


def test_memory_that_cannot_be_pinned_is_used_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allocate, asked = torch.empty, list[bool]()

    def refuse(size: int, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nSearch for it")
        return allocate(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", refuse)
    buffers = HostBuffers(torch.device("cuda", 0))
    with caplog.at_level(logging.WARNING):
        taken = [buffers.take(8).numel() for _ in range(2)]
    assert taken == [8, 8]
    assert asked == [True, False, False]
    assert len(caplog.records) == 1
    assert "ulimit -l unlimited) (CUDA error: out of memory)" in caplog.text


def test_a_host_without_room_has_no_memory() -> None:
    with pytest.raises(MemoryError):
        HostBuffers(CPU).take(1 << 60)
