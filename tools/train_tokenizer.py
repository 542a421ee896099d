"""Train a SentencePiece tokenizer on text files. See --help."""

import sys

from relora_ds.cli.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
