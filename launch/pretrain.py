"""Train: deepspeed [--hostfile H] launch/pretrain.py RUN.yaml [key=value ...] [--dry-run]

`python launch/pretrain.py` runs one process, `torchrun --nproc_per_node N` works as well.
"""

import sys

from relora_ds.train.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
