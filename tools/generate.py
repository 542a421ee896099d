"""Go on with a text by a checkpoint or a Hugging Face directory. See --help."""

import sys

from relora_ds.cli.views.generate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
