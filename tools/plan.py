"""What a run takes up, moves and needs in time on a cluster. Allocates nothing. See --help."""

import sys

from relora_ds.cli.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
