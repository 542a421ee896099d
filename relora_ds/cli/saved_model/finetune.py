"""Fine-tune a checkpoint or a Hugging Face directory on a task of GLUE, and score it.

python tools/finetune.py --checkpoint runs/mine --task mrpc --data glue/MRPC
python tools/finetune.py --checkpoint runs/mine --task cola --train lora --seeds 1 2 3

Prints one JSON line with mean, standard deviation and values of each metric over the seeds, which
also goes into the run's summary.json. Defaults are the settings of SwitchLoRA's experiments.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.numbers import Count, Real
from relora_ds.cli.parser import add_checkpoint, run_tool, tool_parser

_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Fine-tune what the arguments name and print one JSON line; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    add_checkpoint(parser, ", or an HF directory")
    parser.add_argument("--task", choices=_TASKS, required=True)
    parser.add_argument(
        "--data",
        default="nyu-mll/glue",
        metavar="WHERE",
        help="folder of the task's TSV files or of all tasks', folder that save_to_disk wrote, or "
        "data set of the Hugging Face hub [nyu-mll/glue]",
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="stop at the first row that cannot be used, or count it and go on",
    )
    parser.add_argument(
        "--train",
        choices=("full", "lora", "adapters"),
        default="full",
        help="beside the head: all weights, new factors, or the factors of the checkpoint [full]",
    )
    parser.add_argument("--lr", type=Real(), help="[3e-5; lora and adapters: 5e-4]")
    parser.add_argument("--epochs", type=Count(), default=30, help="[30]")
    parser.add_argument("--batch-size", type=Count(), default=16, help="[16]")
    parser.add_argument("--max-length", type=Count(8), default=512, help="ids per example [512]")
    parser.add_argument("--rank", type=Count(), default=8, help="of new factors [8]")
    parser.add_argument("--alpha", type=Real(), default=8.0, help="of new factors [8]")
    parser.add_argument(
        "--seeds", type=Count(0, 2**63 - 1), nargs="+", default=[1, 2, 3, 4, 5], help="[1 to 5]"
    )
    parser.add_argument("--limit", type=Count(), help="examples of each split; default: all")
    parser.add_argument("--output", type=Path, help="folder for the models, seed_N for each seed")
    parsed = parser.parse_args(arguments)
    if len(set(parsed.seeds)) < len(parsed.seeds):
        parser.error(
            f"--seeds {' '.join(map(str, parsed.seeds))} names one twice: each counts once"
        )
    return run_tool(lambda: _fine_tune(parsed))


def _fine_tune(parsed: argparse.Namespace) -> None:
    from relora_ds.train.saved_model.glue.examples import read_examples
    from relora_ds.train.saved_model.glue.fine_tune import Settings, fine_tune
    from relora_ds.train.saved_model.glue.tasks import TASKS

    task = TASKS[parsed.task]
    settings = Settings(
        trained=parsed.train,
        lr=parsed.lr,
        epochs=parsed.epochs,
        batch_size=parsed.batch_size,
        max_length=parsed.max_length,
        rank=parsed.rank,
        alpha=parsed.alpha,
        seeds=tuple(parsed.seeds),
    )
    examples = read_examples(task, parsed.data, parsed.on_error, parsed.limit)
    print(json.dumps(fine_tune(parsed.checkpoint, task, examples, settings, parsed.output)))
