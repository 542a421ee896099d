"""The command line of a run: arguments in, exit code out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from relora_ds.activity import doing
from relora_ds.config.load import LoadedRun, check_processes, load_run_config
from relora_ds.errors import PreemptedError
from relora_ds.launched import read_launch
from relora_ds.train.lifetime.lifetime import Lifetime
from relora_ds.train.lifetime.requests import listen, say

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
    lifetime = Lifetime()
    try:
        loaded = load_run_config(parsed.run, parsed.overrides)
        if parsed.dry_run:
            _dry_run(loaded)
        else:
            _run(loaded, lifetime)
    except PreemptedError as error:  # no failure: all ranks have saved, and leave together
        if lifetime.rank == 0:
            say(f"rank 0: {error} (exit code {error.exit_code})")
        return error.exit_code
    except BaseException as error:
        return lifetime.leave(error)
    if parsed.launch_id is not None and lifetime.rank == 0:
        say(f"launch {parsed.launch_id}: completed")
    return 0


def _run(loaded: LoadedRun, lifetime: Lifetime) -> None:
    listen()
    # imported late: a wrong run file is reported before seconds of library imports
    with doing("import"):
        from relora_ds.train.run import run

    try:
        run(loaded, lifetime)
    except PreemptedError:
        lifetime.finish()
        raise
    lifetime.finish()


def _dry_run(loaded: LoadedRun) -> None:
    from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
    from relora_ds.methods.registry import check_requirements
    from relora_ds.parallel.topology import as_one_island, copies_of_island, copies_of_model
    from relora_ds.planning.dry_run import dry_run
    from relora_ds.train.checks import check_start

    # a single process speaks for one copy of the model, however many will share it
    launched = read_launch(os.environ)
    processes, tensor = launched.world_size, loaded.config.parallel.tensor
    copies = 1 if processes == 1 else copies_of_model(processes, tensor)
    own = 1 if processes == 1 else copies_of_island(copies, loaded.config.parallel.islands)
    check_processes(loaded, copies)
    share = as_one_island(loaded.config)
    zero = resolve_deepspeed_config(share.deepspeed, share, own)
    check_requirements(loaded, zero)
    if launched.rank == 0:
        console = Console()
        dry_run(replace(loaded, config=share), zero, console)
        doubts = check_start(loaded.config, loaded.architecture)  # last, so that tables are seen
        for warning in (*loaded.warnings, *doubts):  # a path in it may have brackets
            console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
        console.print("the configuration is valid, and what it names is there")


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "pretrain.py",
        description="Pre-train a LLaMA under DeepSpeed.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN.yaml", help="run description")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without it argparse says that one is needed
        metavar="key=value",
        help="override any key, as method.rank=64",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="look at everything that a start would, print the parameter table and stop; allocates "
        "and changes nothing",
    )
    # launchers append it; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    # launch scripts find the processes of one launch by it, and learn that the run is complete
    parser.add_argument("--launch-id", help=argparse.SUPPRESS)
    return parser
