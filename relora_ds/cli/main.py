"""`relora-ds VERB ...`: the console command. Each verb is the same function that a script calls.

A verb's libraries are imported when it does its work, so that help and mistakes in the arguments
are answered at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relora_ds import __version__
from relora_ds.cli import (
    export,
    import_hf,
    plan,
    plot,
    prepare_data,
    reshape,
    train_tokenizer,
)
from relora_ds.cli.advice import convert_flags, doctor
from relora_ds.cli.saved_model import evaluate, finetune, generate
from relora_ds.cli.views import plot_spectrum, report

PROG = "relora-ds"


def _train(arguments: Sequence[str], prog: str | None) -> int:
    from relora_ds.train.main import main as train

    return train(arguments, prog)


@dataclass(frozen=True)
class Verb:
    """One thing that the command does."""

    run: Callable[[Sequence[str], str | None], int]
    """Takes the arguments after the verb and the words that called it; returns the exit code."""
    summary: str
    """One line of help."""


VERBS = {
    "train": Verb(_train, "train what a run file describes; one process, or under a launcher"),
    "plan": Verb(plan.main, "memory, bytes and time of a run on a cluster; allocates nothing"),
    "prepare-data": Verb(prepare_data.main, "turn text files into a token file"),
    "train-tokenizer": Verb(train_tokenizer.main, "train a SentencePiece tokenizer on text files"),
    "evaluate": Verb(evaluate.main, "perplexity of a checkpoint or a Hugging Face directory"),
    "finetune": Verb(finetune.main, "fine-tune a model on a task of GLUE, and score it"),
    "generate": Verb(generate.main, "go on with a text, from a checkpoint or an export"),
    "export": Verb(export.main, "write a checkpoint's dense model as a Hugging Face directory"),
    "import": Verb(import_hf.main, "write a Hugging Face directory as a checkpoint to begin with"),
    "reshape": Verb(reshape.main, "rewrite a checkpoint for other processes or ZeRO stages"),
    "doctor": Verb(doctor.main, "look for what would stop a run, with a remedy for each finding"),
    "convert-flags": Verb(convert_flags.main, "a run file from another trainer's command line"),
    "plot": Verb(plot.main, "draw a run's loss curve, or a metric of several runs"),
    "plot-spectrum": Verb(plot_spectrum.main, "draw singular values of what training added"),
    "report": Verb(report.main, "write one self-contained HTML page about a run"),
}
"""Every verb by the word that is typed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb that the command line names.

    Args:
        arguments: those of the process by default.

    Returns:
        The exit code: 0 done, otherwise that of the error class (see `errors`).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = _parser().parse_args(words).verb
    rest = words[words.index(verb) + 1 :]  # argparse takes the first `--` out
    return VERBS[verb].run(rest, f"{PROG} {verb}")


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Low-rank pre-training of LLaMA models on a DeepSpeed ZeRO engine.",
        epilog=f"verbs:\n{verbs}\n\n`{PROG} VERB --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="what to do, see below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    return parser
