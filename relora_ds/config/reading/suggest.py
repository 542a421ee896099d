"""What a user who wrote an unknown name most likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# How other trainers spell what we have: the ReLoRA and GaLore authors' flags, Megatron-LM,
# Hugging Face's TrainingArguments, axolotl and PEFT.
SPELLED_ELSEWHERE = {
    "batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "total_batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "gradient_accumulation": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "num_training_steps": "train.steps",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "max_length": "train.seq_length",
    "dtype": "train.precision",
    "bf16": "train.precision",
    "gradient_checkpointing": "train.activation_checkpointing",
    "model_config": "model",
    "warmed_up_model": "train.init_from",
    "warmup_ratio": "schedule.warmup_steps",
    "lr_warmup_iters": "schedule.warmup_steps",
    "scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "clip_grad": "optimizer.clip",
    "clip_grad_norm": "optimizer.clip",
    "max_grad_norm": "optimizer.clip",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "tensor_model_parallel_size": "parallel.tensor",
    "sequence_parallel": "parallel.sequence",
    "eval_every": "eval.every",
    "eval_interval": "eval.every",
    "eval_steps": "eval.every",
    "save_every": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "keep_checkpoints": "checkpoint.keep",
    "autoresume": "checkpoint.resume",
    "resume_from": "checkpoint.resume",
    "resume_from_checkpoint": "checkpoint.resume",
    "save_dir": "output_dir",
    "lora_r": "method.rank",
    "r": "method.rank",
    "lora_alpha": "method.alpha",
    "sp_ratio": "method.sparsity",
    "train_scaling": "method.trainable_scaling",
    "relora": "method.merge_every",
    "relora_steps": "method.merge_every",
    "cycle_length": "method.merge_every",
    "jagged_restart_steps": "method.merge_every",
    "jagged_restart_warmup_steps": "method.restart_warmup_steps",
    "reset_optimizer_on_relora": "method.reset.mode",
    "relora_prune_method": "method.reset.mode",
    "relora_prune_ratio": "method.reset.fraction",
    "optimizer_magnitude_pruning": "method.reset.fraction",
    "optimizer_random_pruning": "method.reset.fraction",
}


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that looks most like `name`, if one does."""
    by_shape = {_shape(candidate): candidate for candidate in valid}
    found = difflib.get_close_matches(_shape(name), by_shape, n=1, cutoff=0.6)
    return by_shape[found[0]] if found else None


def did_you_mean(name: str, valid: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """A remedy for an unknown name.

    Args:
        name: what was written.
        valid: the names that may stand there.
        elsewhere: full keys such as `optimizer.lr` that may stand in another section.
    """
    names, keys = sorted(valid), sorted(elsewhere)
    known = SPELLED_ELSEWHERE.get(_shape(name))
    moved = [key for key in keys if key.rpartition(".")[2] == name]
    guess = nearest(name, names)
    if known in keys:
        return f"did you mean `{known}`?"
    if moved and (guess is None or len(moved) == 1):
        return f"did you mean {' or '.join(f'`{key}`' for key in moved)}?"
    if guess is not None:
        return f"did you mean `{guess}`?"
    return f"valid names are {', '.join(names)}"


def _shape(name: str) -> str:
    return name.strip().lower().lstrip("-").replace("-", "_")
