"""Fine-tune a checkpoint or a Hugging Face directory on a task of GLUE. See --help."""

import sys

from relora_ds.cli.saved_model.finetune import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
