"""Look for what would stop a run on this machine or on the nodes of a hostfile. See --help."""

import sys

from relora_ds.cli.advice.doctor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
