"""Rewrite a checkpoint for other numbers of processes or another ZeRO stage.

python tools/reshape_checkpoint.py --checkpoint runs/mine --output reshaped --data-parallel 4 --tensor 2 --zero-stage 3
deepspeed --num_gpus 8 launch/pretrain.py RUN.yaml parallel.tensor=2 checkpoint.resume=reshaped
"""  # noqa: E501 - commands to be copied

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.checkpoint.reshape import reshape_checkpoint
from relora_ds.command_line import add_checkpoint, run_tool, tool_parser


def main() -> None:
    parser = tool_parser(__doc__)
    add_checkpoint(parser)
    parser.add_argument("--output", type=Path, required=True, help="new directory to write")
    parser.add_argument(
        "--data-parallel", type=int, help="processes that will continue it; default: as before"
    )
    parser.add_argument("--tensor", type=int, help="tensor-parallel processes; default: as before")
    parser.add_argument("--zero-stage", type=int, help="their ZeRO stage; default: as before")
    parsed = parser.parse_args()
    sizes = parsed.data_parallel, parsed.zero_stage, parsed.tensor
    reshape_checkpoint(parsed.checkpoint, parsed.output, *sizes)


if __name__ == "__main__":
    sys.exit(run_tool(main))
