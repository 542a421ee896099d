"""The command line of a run: arguments in, exit code out."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console

from relora_ds.config.load import LoadedRun, check_processes, load_run_config
from relora_ds.errors import CollectiveTimeoutError, ConfigError, ReloraError

_PRECEDENCE_S = 3  # the deepspeed launcher looks once a second

_EXAMPLE = """
example:
  deepspeed --num_gpus 2 launch/pretrain.py configs/run/quickstart.yaml method.rank=16
"""


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Run what the command line says.

    Args:
        arguments: those after the command's name.
        prog: how the command was called, for its help; None for `launch/pretrain.py`.

    Returns:
        The exit code: 0 done, otherwise that of the error class (see `errors`).
    """
    parsed = _parser(prog).parse_intermixed_args(arguments)
    try:
        loaded = load_run_config(parsed.run, parsed.overrides)
        if parsed.dry_run:
            _dry_run(loaded)
        else:
            _run(loaded)
        if parsed.launch_id is not None and _rank() == 0:
            sys.stderr.write(f"launch {parsed.launch_id}: completed\n")
    except CollectiveTimeoutError as error:
        _leave(_report(error))
    except ReloraError as error:
        return _report(error)
    return 0


def _run(loaded: LoadedRun) -> None:
    # imported late: a wrong run file is reported before seconds of library imports
    from relora_ds.engine import distributed
    from relora_ds.train.run import run

    peers_lost = False
    try:
        run(loaded)
    except RuntimeError as error:
        peers_lost = distributed.lost_peers(error)
        if not peers_lost:
            raise
        raise CollectiveTimeoutError(
            f"lost contact with another rank, or waited for it longer than train.timeout_minutes "
            f"({loaded.config.train.timeout_minutes:g}): it is dead, stuck, unreachable or took "
            f"another path; see logs/rank_*.log and resume ({error})"
        ) from error
    finally:
        if not peers_lost:
            distributed.stop()


def _leave(code: int) -> NoReturn:
    """End the process without talking to the others once more: process groups wait or abort then.

    A peer that failed has an exit code that says more. It leaves first, so that a launcher, which
    reports the first code it sees, reports that one.
    """
    logging.shutdown()
    time.sleep(_PRECEDENCE_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _dry_run(loaded: LoadedRun) -> None:
    from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
    from relora_ds.methods.registry import check_requirements
    from relora_ds.parallel.topology import copies_of_model
    from relora_ds.planning.dry_run import dry_run

    # a single process speaks for one copy of the model, however many will share it
    processes, tensor = int(os.environ.get("WORLD_SIZE", "1")), loaded.config.parallel.tensor
    copies = 1 if processes == 1 else copies_of_model(processes, tensor)
    check_processes(loaded, copies)
    zero = resolve_deepspeed_config(loaded.config.deepspeed, loaded.config, copies)
    check_requirements(loaded, zero)
    if _rank() == 0:
        console = Console()
        for warning in loaded.warnings:
            console.print(f"warning: {warning}", highlight=False)
        dry_run(loaded, zero, console)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "pretrain.py",
        description="Pre-train a LLaMA under DeepSpeed.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN.yaml", help="run description")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override any key, as method.rank=64"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="validate, print the parameter table and stop; allocates nothing",
    )
    # launchers append it; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    # launch scripts find the processes of one launch by it, and learn that the run is complete
    parser.add_argument("--launch-id", help=argparse.SUPPRESS)
    return parser


def _report(error: ReloraError) -> int:
    """One line per problem: from rank 0 for what every rank finds, from the rank concerned else."""
    if isinstance(error, ConfigError):
        if _rank() == 0:
            for problem in error.problems:
                sys.stderr.write(f"error: {problem}\n")
    else:
        logging.getLogger(__name__).error("rank %d: %s", _rank(), error)
        if not logging.getLogger().handlers or _rank() != 0:
            sys.stderr.write(f"error: rank {_rank()}: {error}\n")
    return error.exit_code


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
