"""Go on with a text by a checkpoint or a Hugging Face directory. See --help."""

import sys

from relora_ds.cli.saved_model.generate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
