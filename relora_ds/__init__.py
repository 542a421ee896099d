"""Low-rank pre-training of LLaMA models on a DeepSpeed ZeRO engine."""

__version__ = "0.1.0"
