"""DeepSpeed behind one door: nothing outside of this package imports it or knows its insides."""

import os

import torch

# DeepSpeed picks its accelerator when it is imported, and guesses loudly on machines without a GPU
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
