"""Write a Hugging Face directory as a checkpoint of ours that runs begin with. See --help."""

import sys

from relora_ds.cli.import_hf import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
