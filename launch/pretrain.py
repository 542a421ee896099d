"""Train: deepspeed [--hostfile H] launch/pretrain.py RUN.yaml [key=value ...] [--dry-run]

`python launch/pretrain.py` runs one process, `torchrun --nproc_per_node N` works as well.
"""

import sys

from relora_ds.train.lifetime.requests import listen

if __name__ == "__main__":
    listen()  # before seconds of imports: a launcher may end, and a user may press Ctrl-C, in them

    from relora_ds.train.lifetime.lifetime import leave_process
    from relora_ds.train.main import main

    leave_process(main(sys.argv[1:]))
