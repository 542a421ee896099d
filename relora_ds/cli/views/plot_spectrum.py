"""Draw singular values and effective ranks of what training added to every projection.

python tools/plot_spectrum.py --checkpoint runs/relora runs/full --output spectrum.png

The change is that since the run began, or since the model that --since names. Where a weight is a
sum (frozen and adapter, low-rank and sparse), the change of each term is drawn as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from relora_ds.cli.parser import run_tool, tool_parser


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Draw the models that the arguments name and print the picture's path; returns the exit
    code."""
    parser = tool_parser(__doc__, prog=prog)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        required=True,
        help="step_N, a directory of checkpoints, a run directory, or an HF directory",
    )
    parser.add_argument("--since", type=Path, help="model that they are compared with")
    parser.add_argument(
        "--output", type=Path, default=Path("spectrum.png"), help="picture [spectrum.png]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as well")
    parsed = parser.parse_args(arguments)
    return run_tool(lambda: _plot(parsed))


def _plot(parsed: argparse.Namespace) -> None:
    from relora_ds.train.telemetry.atomic import write_atomically
    from relora_ds.train.views.figures import save_figure
    from relora_ds.train.views.spectrum import draw_spectra, spectra

    found = [each for path in parsed.checkpoint for each in spectra(path, parsed.since)]
    save_figure(draw_spectra(found), parsed.output)
    if parsed.json is not None:
        text = json.dumps([each.as_dict() for each in found])
        write_atomically(parsed.json, text.encode())
    print(parsed.output)
