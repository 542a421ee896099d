"""Write the merged dense model of a checkpoint as a Hugging Face directory. See --help."""

import sys

from relora_ds.cli.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
