"""A rank's work of a save: one after the other in its thread, and heard of however it ends."""

from __future__ import annotations

import errno
import threading
import weakref
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from relora_ds.checkpoint.saving.contents import Pickled
from relora_ds.checkpoint.saving.task import Files, Task, Worker, write_contents
from relora_ds.files.durable import Written

T = TypeVar("T")
NOTHING: Files = {}
CPU = torch.device("cpu")


def ended(task: Task[T]) -> Task[T]:
    task.wait(30)
    assert task.done
    return task


def test_tasks_run_one_after_the_other_in_one_thread_without_gradients() -> None:
    worker, seen, may_go = Worker(0, CPU), list[tuple[int, str, bool]](), threading.Event()

    def work(number: int) -> Files:
        may_go.wait(30)
        own = threading.current_thread()
        assert own.daemon, "a process that ends does not wait for a disk"
        seen.append((number, own.name, torch.is_grad_enabled()))
        return {str(number): Written(number, "")}

    tasks = [worker.start(lambda number=number: work(number)) for number in range(3)]
    assert not any(task.done or task.failed for task in tasks)
    tasks[0].wait(0)  # returns although nothing has ended
    may_go.set()
    assert [ended(task).result() for task in tasks] == [{str(n): Written(n, "")} for n in range(3)]
    assert seen == [(number, "save", False) for number in range(3)]


def test_the_thread_works_on_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[str, torch.device]] = []

    def choose(device: torch.device) -> None:
        chosen.append((threading.current_thread().name, device))

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    gpu = torch.device("cuda", 3)
    ended(Worker(3, gpu).start(lambda: NOTHING))
    assert chosen == [("save", gpu)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.pt"), "a.pt: No space left on device"),
        (RuntimeError("odd"), "RuntimeError: odd"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_whatever_ends_a_task_is_a_problem_of_its_rank(error: BaseException, words: str) -> None:
    def fail() -> Files:
        raise error

    worker = Worker(3, CPU)
    failed, next_one = worker.start(fail), worker.start(lambda: NOTHING)
    problem = ended(failed).problem()
    assert problem is not None
    assert (problem.rank, problem.what) == (3, words)
    assert failed.failed
    assert ended(next_one).result() == NOTHING  # the thread goes on
    assert not next_one.failed
    assert next_one.problem() is None


class Held:
    """An object whose end can be seen."""


def test_an_ended_task_lets_go_of_what_it_held() -> None:
    held = Held()
    gone = weakref.ref(held)

    def work(held: Held = held) -> Files:
        return NOTHING

    task = Task(work, 0)
    del held, work
    assert gone() is not None
    task.run()
    assert gone() is None  # a snapshot is as large as a model


def test_a_cancelled_write_stops_between_files(tmp_path: Path) -> None:
    cancelled = threading.Event()
    (tmp_path / "whole").mkdir()

    class Last(Pickled):
        def write(self, file: Any) -> None:
            super().write(file)
            cancelled.set()

    contents = {"a.pt": Pickled({}), "b.pt": Last({}), "c.pt": Pickled([torch.zeros(4)])}
    worker = Worker(0, CPU)
    task = ended(worker.start(lambda: write_contents(contents, tmp_path, cancelled)))
    assert task.failed
    assert task.problem() is None
    whole = write_contents({"c.pt": contents["c.pt"]}, tmp_path / "whole", threading.Event())
    assert (tmp_path / "b.pt").stat().st_size > 0
    assert (tmp_path / "c.pt").stat().st_size < whole["c.pt"].bytes


def test_what_was_written_is_told_by_name(tmp_path: Path) -> None:
    contents = {"a.pt": Pickled({"x": torch.arange(3)}), "b.pt": Pickled({})}
    written = write_contents(contents, tmp_path, threading.Event())
    assert {name: file.bytes for name, file in written.items()} == {
        path.name: path.stat().st_size for path in tmp_path.iterdir()
    }
    assert torch.equal(torch.load(tmp_path / "a.pt")["x"], torch.arange(3))
