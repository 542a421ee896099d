"""Write a run file from a command line of the authors' trainers, or from an axolotl file.

python tools/convert_flags.py -- torchrun --nproc_per_node 8 torchrun_main.py --relora 1000 --use_peft True
python tools/convert_flags.py --axolotl config.yml --processes 8

Knows the trainers of ReLoRA, SwitchLoRA, and of SLTrain and GaLore. The run file goes to standard
output; what has no meaning here, or another one, is named in comments at its top. What keeps it
from being a run goes to standard error, with exit code 2: mend it there.
"""  # noqa: E501 - commands to be copied

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.numbers import Count
from relora_ds.cli.parser import run_tool, tool_parser


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Print the run that the arguments describe; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    parser.add_argument(
        "--trainer", choices=("relora", "switchlora", "sltrain"), help="default: told by the flags"
    )
    parser.add_argument("--axolotl", type=Path, metavar="FILE", help="configuration of axolotl's")
    parser.add_argument(
        "--processes", type=Count(), default=1, help="that an axolotl file runs on [1]"
    )
    parser.add_argument("command", nargs="*", metavar="-- COMMAND", help="to be converted")
    own, theirs = _divided(arguments)
    parsed = parser.parse_args(own)
    if (parsed.axolotl is None) == (not theirs):
        parser.error("give a command after `--`, or a file with --axolotl")
    return run_tool(lambda: _convert(parsed, theirs))


def _divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and the command after the first `--`."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _convert(parsed: argparse.Namespace, command: list[str]) -> None:
    from relora_ds.planning.foreign.convert import convert_axolotl, convert_command

    if parsed.axolotl is not None:
        converted = convert_axolotl(parsed.axolotl, parsed.processes)
    else:
        converted = convert_command(command, parsed.trainer)
    print(converted, end="")
    converted.check()
