"""Perplexity of a checkpoint or a Hugging Face directory on a token file. See --help."""

import sys

from relora_ds.cli.saved_model.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
