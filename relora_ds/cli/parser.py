"""What all command lines have in common: their parsers, and errors as exit codes.

A command has two doors, `python tools/X.py` in a checkout and `relora-ds VERB` where the package is
installed. The door is what help and error messages name.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from relora_ds.errors import ConfigError, PreemptedError, ReloraError
from relora_ds.files.durable import describe, remedy
from relora_ds.redaction import mask_urls

_INPUTS = "text files, directories of them, or patterns in quotes such as 'c4/*.json.gz'"
_DATASET = (
    "folder that save_to_disk wrote, or a data set on the Hugging Face hub, which is streamed"
)
_SCRIPT = re.compile(r"python tools/\w+\.py")


def tool_parser(
    text: str | None, example: str = "", prog: str | None = None
) -> argparse.ArgumentParser:
    """A parser whose help shows a command's own text as it is written.

    Args:
        text: what the command does, the docstring of its module.
        example: shown below the arguments.
        prog: how the command was called, `relora-ds VERB`; None for the script in `tools/`, whose
            name `text` and `example` hold.
    """
    if prog is not None:
        text, example = (_SCRIPT.sub(prog, part) for part in (text or "", example))
    return argparse.ArgumentParser(
        prog=prog,
        description=text,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """`run` and `overrides`: a run file and changes of its keys."""
    parser.add_argument("run", metavar="RUN.yaml", help="run description")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key")


def add_checkpoint(parser: argparse.ArgumentParser, more: str = "") -> None:
    """`--checkpoint`: a saved run.

    Args:
        more: what else it may be.
    """
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help=f"step_N, a directory of checkpoints (the latest), or a run directory{more}",
    )


def add_texts(parser: argparse.ArgumentParser, or_dataset: bool = False) -> None:
    """`--input`, `--text-key` and `--on-error`: text files and how to read them.

    Args:
        parser: takes the options.
        or_dataset: also take a data set in place of files, with its configuration and split.
    """
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--input", nargs="+", metavar="FILE", help=_INPUTS)
    if or_dataset:
        texts.add_argument("--dataset", metavar="NAME", help=_DATASET)
        parser.add_argument(
            "--dataset-config", metavar="NAME", help="configuration of the data set"
        )
        parser.add_argument(
            "--split", help="split of the data set; default: the only one, or train"
        )
    parser.add_argument(
        "--text-key", default="text", help="key or column of the text; meta.text is one in another"
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="stop at the first input that cannot be used, or count it and go on",
    )


def run_tool(work: Callable[[], None]) -> int:
    """The exit code of `work`; what a user can set right is printed, one line per problem.

    Whoever reads standard output may stop early, as `head` does: that is no failure.
    """
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
    except OSError as error:
        sys.stderr.write(f"error: {describe(error)}; {remedy(error)}\n")
        _forget_output()
        return ReloraError.exit_code
    except ReloraError as error:
        problems = error.shown if isinstance(error, ConfigError) else [error]
        sys.stderr.writelines(f"error: {mask_urls(str(problem))}\n" for problem in problems)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("stopped: what was not finished has left nothing\n")
        return PreemptedError.exit_code
    return 0


def _forget_output() -> None:
    """Drop what is still to be printed, if it cannot be: the interpreter's end would try again."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
