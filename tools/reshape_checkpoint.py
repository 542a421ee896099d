"""Rewrite a checkpoint for other numbers of processes or another ZeRO stage. See --help."""

import sys

from relora_ds.cli.reshape import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
