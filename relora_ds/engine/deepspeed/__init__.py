"""DeepSpeed behind one door: nothing else imports it or reads its private parts."""

import os

import torch

# DeepSpeed picks its accelerator when it is imported, and guesses loudly on machines without a GPU
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
