"""Draw a run's loss curve, or a metric of several runs. See --help."""

import sys

from relora_ds.cli.plot import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
