"""Turn text files into a token file that training reads. See --help."""

import sys

from relora_ds.cli.prepare_data import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
