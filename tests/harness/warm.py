"""A process that has imported everything, and forks processes which start in no time.

Importing torch, DeepSpeed and Megatron costs a rank five seconds of a core, a fork of this process
costs milliseconds. Each forked process is fresh: what it does to global state dies with it.

Forked ranks differ from ranks of their own start in one point: they share one hash seed. Tests
whose subject is a start (launchers, import order, signals) use `tests.harness.run.start`.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import runpy
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import NoReturn

GROUP_TIMEOUT_MINUTES = 5.0
"""How long a collective of a case may take."""

_TERMINATE_S = 30.0
"""How long `Launcher` lets ranks end by themselves, as DeepSpeed does."""

_STABLE = ("torch", "megatron.core.parallel_state", "megatron.core.tensor_parallel")
_STABLE += ("matplotlib.pyplot", "safetensors.torch", "rich.progress", "pydantic", "yaml")
_STABLE += ("megatron.core.datasets.indexed_dataset",)
_PRODUCT = ("deepspeed", "relora_ds.train.main", "relora_ds.train.run")
_PRODUCT += ("relora_ds.checkpoint.rewriting.reshape", "relora_ds.planning.dry_run")


@dataclass(frozen=True)
class Script:
    """A Python file that runs as the main program.

    Args:
        path: of the file, from the root of the project.
        arguments: its command line.
    """

    path: str
    arguments: tuple[str, ...]

    def __call__(self) -> None:
        sys.argv[:] = [self.path, *self.arguments]
        runpy.run_path(self.path, run_name="__main__")


@dataclass(frozen=True)
class Case:
    """A function that every rank of a group calls.

    Args:
        content: the pickled function and its arguments by name; it is unpickled on the rank, so
            that the process which forks never imports a test.
        result: file in which rank 0 leaves what the function returned there, pickled.
    """

    content: bytes
    result: str

    def __call__(self) -> None:
        from relora_ds.engine import distributed

        function, arguments = pickle.loads(self.content)
        topology = distributed.start(GROUP_TIMEOUT_MINUTES)
        returned = function(topology, **arguments)
        if topology.is_main:
            Path(self.result).write_bytes(pickle.dumps(returned))
        distributed.stop()


@dataclass(frozen=True)
class Start:
    """One process to fork.

    Args:
        job: what it does.
        environment: its whole environment.
        output: file to which standard output and standard error are appended.
    """

    job: Script | Case | Launcher
    environment: dict[str, str]
    output: str


@dataclass(frozen=True)
class Launcher:
    """What stands between ranks and the user, as DeepSpeed's `launch.py` does on a node.

    The ranks are its children, in its session and group. Once one of them has failed or it is told
    to stop, it ends the others, politely at first; its exit code is that of the one that failed.

    Args:
        ranks: what to fork.
    """

    ranks: tuple[Start, ...]

    def __call__(self) -> None:
        children = [_fork(start, None) for start in self.ranks]
        asked = False

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            asked = True

        signal.signal(signal.SIGTERM, stop)
        codes: dict[int, int | None] = dict.fromkeys(children)
        while None in codes.values() and not asked and not any(codes.values()):
            time.sleep(0.02)
            _reap(codes)
        failed = next((code for code in codes.values() if code), int(asked))
        deadline = time.monotonic() + _TERMINATE_S
        _signal_all(codes, signal.SIGTERM)
        while None in codes.values() and time.monotonic() < deadline:
            time.sleep(0.02)
            _reap(codes)
        _signal_all(codes, signal.SIGKILL)
        raise SystemExit(failed)


def serve(descriptor: int) -> None:
    """Fork what is asked for, and say how it ended, until the other end of the pipe closes.

    A request is a list of `Start`, answered with process ids, or a list of process ids, answered
    with an exit code each: None while the process runs, negative for the signal that ended it.
    """
    _import_everything()
    connection = Connection(descriptor)
    codes: dict[int, int | None] = {}
    while True:
        try:
            request: list[Start] | list[int] = connection.recv()
        except EOFError:
            break
        started = [_fork(each, connection) for each in request if isinstance(each, Start)]
        codes |= dict.fromkeys(started)
        _reap(codes)
        asked = [codes[each] for each in request if isinstance(each, int)]
        connection.send(started or asked)
    for process, code in codes.items():
        if code is None:
            end_session(process)


def end_session(leader: int) -> None:
    """Kill a process that `serve` has started, and all that it has started in its session.

    Its number is its own as long as `serve` has not told how it ended. It may lead no session yet.
    """
    for kill in (os.kill, os.killpg):
        with suppress(ProcessLookupError):
            kill(leader, signal.SIGKILL)


def _import_everything() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _STABLE:
            importlib.import_module(name)
        # An engine's end collects garbage, which takes a quarter of a second over all of torch.
        # DeepSpeed comes later: the product looks for one of its objects among the collected ones.
        gc.freeze()
        for name in _PRODUCT:
            importlib.import_module(name)
    _compile_kernels()


def _compile_kernels() -> None:
    """All of them: a process compiles what is not there yet, which takes it most of a second."""
    import relora_ds
    from relora_ds.numerics.host.kernels import load_kernels

    for source in Path(relora_ds.__file__).parent.rglob("*.c"):
        load_kernels(source)


def _signal_all(codes: Mapping[int, int | None], number: int) -> None:
    for process, code in codes.items():
        if code is None:
            os.kill(process, number)


def _reap(codes: dict[int, int | None]) -> None:
    for process, code in codes.items():
        if code is None:
            ended, status = os.waitpid(process, os.WNOHANG)
            codes[process] = os.waitstatus_to_exitcode(status) if ended else None


def _fork(start: Start, connection: Connection | None) -> int:
    """Fork a process: of a session of its own, or of this one's where there is no connection."""
    process = os.fork()
    if process == 0:
        if connection is not None:
            connection.close()
            os.setsid()
        _become(start)
    return process


def _become(start: Start) -> NoReturn:
    """Leave nothing of the process that was forked but what it has imported."""
    output = os.open(start.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(start.environment)
    code = 0
    try:
        start.job()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
