"""Rewrite a checkpoint for other numbers of processes or another ZeRO stage.

python tools/reshape_checkpoint.py --checkpoint runs/mine --output reshaped --data-parallel 4 --tensor 2 --zero-stage 3
deepspeed --num_gpus 8 launch/pretrain.py RUN.yaml parallel.tensor=2 checkpoint.resume=reshaped
"""  # noqa: E501 - commands to be copied

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from relora_ds.errors import ConfigError, ReloraError
from relora_ds.train.reshape import reshape_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="step_N, a directory of checkpoints (the latest), or a run directory",
    )
    parser.add_argument("--output", type=Path, required=True, help="new directory to write")
    parser.add_argument(
        "--data-parallel", type=int, help="processes that will continue it; default: as before"
    )
    parser.add_argument("--tensor", type=int, help="tensor-parallel processes; default: as before")
    parser.add_argument("--zero-stage", type=int, help="their ZeRO stage; default: as before")
    arguments = parser.parse_args()
    try:
        reshape_checkpoint(
            arguments.checkpoint,
            arguments.output,
            arguments.data_parallel,
            arguments.zero_stage,
            arguments.tensor,
        )
    except ReloraError as error:
        problems = error.problems if isinstance(error, ConfigError) else [error]
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
