"""Perplexity of a checkpoint or a Hugging Face directory on token files, and tasks of lm-eval.

python tools/evaluate.py --checkpoint runs/quickstart/hf --data data/valid --seq-length 256
python tools/evaluate.py --checkpoint runs/quickstart/hf --lm-eval arc_easy hellaswag

Prints one JSON line per token file, with its name if there are several, then one for lm-eval, whose
results also go into the export's model card and the run's summary.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.numbers import Count, Real
from relora_ds.cli.parser import add_checkpoint, run_tool, tool_parser


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Score what the arguments name and print one JSON line; returns the exit code."""
    parser = tool_parser(__doc__, prog=prog)
    add_checkpoint(parser, ", or an HF directory")
    parser.add_argument(
        "--data", nargs="+", metavar="PREFIX", help="token files, or `builtin`; scored one by one"
    )
    parser.add_argument(
        "--seq-length", type=Count(), help="default: that of the run, or 2048 at most"
    )
    parser.add_argument("--batch-size", type=Count(), default=8, help="sequences per forward pass")
    parser.add_argument(
        "--protocol",
        choices=("exact", "galore_compat"),
        default="exact",
        help="exact: mean over all tokens; galore_compat: as the published tables of GaLore and "
        "SLTrain, for which --seq-length, --batch-size and --ranks are those of the published run",
    )
    parser.add_argument(
        "--ranks",
        type=Count(),
        default=1,
        help="processes that galore_compat's rows are dealt out to; they are computed one by one",
    )
    parser.add_argument(
        "--document-mask",
        action=argparse.BooleanOptionalAction,
        help="keep documents in a window apart (data.document_mask); default: as in the run",
    )
    parser.add_argument(
        "--valid-share",
        type=Real(1),
        metavar="SHARE",
        help="score only the documents that a run with this data.valid_share holds out of the file",
    )
    parser.add_argument("--lm-eval", nargs="+", metavar="TASK", help="needs the package lm_eval")
    parser.add_argument(
        "--limit", type=Count(), help="examples of each task of lm-eval; default: all"
    )
    parser.add_argument(
        "--include-tasks", type=Path, metavar="DIR", help="further tasks for lm-eval"
    )
    parsed = parser.parse_args(arguments)
    if not parsed.data and not parsed.lm_eval:
        parser.error("name what to score on: --data PREFIX, or --lm-eval TASK")
    if parsed.valid_share is not None and parsed.protocol != "exact":
        parser.error("--valid-share is for --protocol exact: galore_compat scores whole files")
    return run_tool(lambda: _evaluate(parsed))


def _evaluate(parsed: argparse.Namespace) -> None:
    if parsed.data:
        _score(parsed)
    if parsed.lm_eval:
        from relora_ds.train.saved_model.lm_eval import run_tasks

        sizes = parsed.limit, parsed.batch_size
        found = run_tasks(parsed.checkpoint, parsed.lm_eval, *sizes, parsed.include_tasks)
        print(json.dumps({"lm_eval": found}))


def _score(parsed: argparse.Namespace) -> None:
    from relora_ds.train.evaluate_checkpoint import evaluate_sets

    ranks = parsed.ranks if parsed.protocol == "galore_compat" else None
    sizes = parsed.seq_length, parsed.batch_size
    parts = parsed.document_mask, parsed.valid_share
    found = evaluate_sets(parsed.checkpoint, parsed.data, *sizes, ranks, *parts)
    for name, scores in zip(parsed.data, found, strict=True):
        print(json.dumps(scores if len(found) == 1 else {"data": name, **scores}))
