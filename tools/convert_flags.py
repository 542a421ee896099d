"""Write a run file from a command line of another trainer. See --help."""

import sys

from relora_ds.cli.advice.convert_flags import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
