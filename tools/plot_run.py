"""Draw a run's loss curve. See --help."""

import sys

from relora_ds.cli.plot import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
