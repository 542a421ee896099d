"""Write one self-contained HTML page about a run. See --help."""

import sys

from relora_ds.cli.views.report import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
