"""What other trainers call things: their defaults, our keys, and what has no meaning here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from relora_ds.planning.foreign.flags import Flags

Notes = list[str]


@dataclass(frozen=True)
class Trainer:
    """One trainer's flags."""

    defaults: Mapping[str, str]
    """Its own, where a run of ours has another one."""
    keys: Mapping[str, str]
    """Our key by flag; the value is read as YAML."""
    dropped: Mapping[str, str]
    """Why a flag has no meaning here."""
    method: Callable[[Flags, Notes], dict[str, Any]]
    """The section `method`."""
    derived: frozenset[str] = field(default_factory=frozenset)
    """Flags that `method` and the conversion of batches, lengths and types read."""


_COMMON = {
    "model_config": "model",
    "batch_size": "train.micro_batch_size",
    "max_length": "train.seq_length",
    "num_training_steps": "train.steps",
    "seed": "train.seed",
    "warmed_up_model": "train.init_from",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "warmup_steps": "schedule.warmup_steps",
    "min_lr_ratio": "schedule.min_lr_ratio",
    "eval_every": "eval.every",
    "save_every": "checkpoint.every",
    "keep_checkpoints": "checkpoint.keep",
    "save_dir": "output_dir",
    "activation_checkpointing": "train.activation_checkpointing",
}
_DERIVED = frozenset(
    [
        "total_batch_size",
        "gradient_accumulation",
        "max_train_tokens",
        "dtype",
        "scheduler",
        "optimizer",
        "autoresume",
        "adam_beta1",
        "adam_beta2",
    ]
)
_DROPPED = {
    "workers": "batches are read from memory-mapped token files, without workers",
    "num_workers": "batches are read from memory-mapped token files, without workers",
    "dataset_path": "prepare the text with `relora-ds prepare-data`, and name it in data.train",
    "megatron_dataset_config": "name its .bin/.idx prefixes in data.train and data.valid",
    "training_config": "convert its keys as flags",
    "tags": "there are no tags; log.wandb.name names the run",
    "name": "log.wandb.name names the run",
    "comment": "there are no notes",
    "wandb_watch": "gradients are not watched",
    "profile": "log.profile=[from, to] traces steps",
    "quantize": "frozen weights are kept in bf16 with an exact residual, not quantised",
    "use_double_quant": "frozen weights are not quantised",
    "distributed_type": "the ZeRO stage of the file `deepspeed` decides",
    "single_gpu": "start one process",
    "use_hf_model": "the model is ours, with Hugging Face's names and mathematics",
    "resume_from": "its checkpoints are not read; start from its weights with train.init_from",
    "continue_from": "its checkpoints are not read; start from its weights with train.init_from",
    "load_optimizer_state_on_resume": "a resumed run has its optimizer state",
    "model_revision": "download the model first, and name its directory in train.init_from",
    "skip_batches": "guards.non_finite: skip leaves broken batches out",
    "plot_rank": "`relora-ds plot-spectrum` draws singular values of a checkpoint",
    "lora_dropout": "there is no dropout in pre-training here",
    "beta1": "Adafactor is not offered",
}


def _relora(flags: Flags, notes: Notes) -> dict[str, Any]:
    if not flags.is_on("use_peft") and "relora" not in flags:
        return {"name": "full"}
    factors = {"rank": flags.whole("lora_r"), "alpha": flags.real("lora_alpha")}
    if flags.is_on("train_scaling"):
        factors["trainable_scaling"] = True
    if "relora" not in flags:
        return {"name": "lora", **factors}
    every = flags.whole("relora")
    cycle = flags.whole("cycle_length", every)
    if cycle != every:
        notes.append(f"cycle_length {cycle}: restarts of the rate and merges are one here, {every}")
    method = {"name": "relora", **factors, "merge_every": every, "reset": _reset(flags, notes)}
    for flag in ("restart_warmup_steps", "adjust_step"):
        if flag in flags:
            method[flag] = flags.whole(flag)
    return method


def _reset(flags: Flags, notes: Notes) -> dict[str, Any]:
    for flag, mode in (
        ("optimizer_magnitude_pruning", "magnitude"),
        ("optimizer_random_pruning", "random"),
    ):
        if flags.real(flag, 0.0) > 0:
            notes.append(f"{flag}: both moments are pruned together; reset.joint: false is theirs")
            return {"mode": mode, "fraction": flags.real(flag)}
    if "reset_optimizer_on_relora" in flags and not flags.is_on("reset_optimizer_on_relora"):
        notes.append("reset_optimizer_on_relora false: moments are always reset, mode zero is used")
    return {"mode": "zero"}


def _switchlora(flags: Flags, notes: Notes) -> dict[str, Any]:
    factors = {"rank": flags.whole("lora_rank"), "alpha": flags.real("lora_alpha")}
    if not flags.is_on("switch_lora"):
        return {"name": "lora", **factors} if flags.is_on("use_lora") else {"name": "full"}
    notes.append("lr is that of everything, as there; optimizer.adapter_lr sets that of adapters")
    return {
        "name": "switchlora",
        **factors,
        "interval": flags.real("switch_lora_interval"),
        "descent_rate": flags.real("switch_lora_descent_rate"),
        "freeze_steps": flags.whole("adam_warm_step"),
        "candidates": "device" if flags.is_on("no_offload_candidates") else "host",
    }


def _sltrain(flags: Flags, notes: Notes) -> dict[str, Any]:
    if flags.text("optimizer").lower().startswith("galore"):
        return {
            "name": "galore",
            "rank": flags.whole("rank"),
            "update_every": flags.whole("update_proj_gap", 50),
            "scale": flags.real("galore_scale", 1.0),
        }
    if flags.text("peft_model") != "sltrain":
        return {"name": "full"}
    alpha, sparsity = flags.real("lora_alpha"), flags.real("sp_ratio")
    return {"name": "sltrain", "rank": flags.whole("rank"), "alpha": alpha, "sparsity": sparsity}


TRAINERS = {
    "relora": Trainer(
        {
            "max_length": "512",
            "lr": "1e-4",
            "warmup_steps": "1000",
            "num_training_steps": "10000",
            "lora_r": "128",
            "lora_alpha": "32",
            "seed": "0",
            "optimizer": "Adam",
            "clip_grad_norm": "1.0",
        },
        _COMMON | {"clip_grad_norm": "optimizer.clip"},
        _DROPPED
        | {
            "model_name_or_path": "download the model, and name its directory in train.init_from",
            "force_keep_original": "the frozen weight is always kept",
        },
        _relora,
        _DERIVED
        | frozenset(
            [
                "use_peft",
                "relora",
                "lora_r",
                "lora_alpha",
                "train_scaling",
                "cycle_length",
                "restart_warmup_steps",
                "adjust_step",
                "reset_optimizer_on_relora",
                "optimizer_magnitude_pruning",
                "optimizer_random_pruning",
            ]
        ),
    ),
    "switchlora": Trainer(
        {
            "max_length": "512",
            "lr": "1e-4",
            "warmup_steps": "100",
            "num_training_steps": "10000",
            "lora_rank": "128",
            "lora_alpha": "1",
            "switch_lora_interval": "40",
            "switch_lora_descent_rate": "0.1",
            "adam_warm_step": "5",
            "seed": "0",
            "optimizer": "Adam",
            "clip_grad_norm": "1.0",
            "min_lr_ratio": "0.0",
        },
        _COMMON | {"clip_grad_norm": "optimizer.clip"},
        _DROPPED
        | {
            "from_json_data": "prepare the text with `relora-ds prepare-data`",
            "padding_data": "documents are packed, not padded",
        },
        _switchlora,
        _DERIVED
        | frozenset(
            [
                "use_lora",
                "switch_lora",
                "lora_rank",
                "lora_alpha",
                "switch_lora_interval",
                "switch_lora_descent_rate",
                "adam_warm_step",
                "no_offload_candidates",
            ]
        ),
    ),
    "sltrain": Trainer(
        {
            "max_length": "256",
            "lr": "1e-4",
            "warmup_steps": "1000",
            "num_training_steps": "10000",
            "peft_model": "full",
            "rank": "128",
            "lora_alpha": "32",
            "sp_ratio": "0.01",
            "optimizer": "Adam",
            "grad_clipping": "0.0",
        },
        _COMMON | {"grad_clipping": "optimizer.clip"},
        _DROPPED | {"proj_type": "the side of a projection follows from its shape"},
        _sltrain,
        _DERIVED
        | frozenset(
            [
                "peft_model",
                "rank",
                "lora_alpha",
                "sp_ratio",
                "train_scaling",
                "update_proj_gap",
                "galore_scale",
            ]
        ),
    ),
}
"""The authors' trainers of ReLoRA, SwitchLoRA, and of SLTrain and GaLore, whose flags are one
family."""

AXOLOTL = {
    "sequence_len": "max_length",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "max_steps": "num_training_steps",
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup_steps",
    "lr_scheduler": "scheduler",
    "max_grad_norm": "clip_grad_norm",
    "seed": "seed",
    "output_dir": "save_dir",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "base_model": "warmed_up_model",
    "lora_r": "lora_r",
    "lora_alpha": "lora_alpha",
    "relora_steps": "relora",
    "jagged_restart_steps": "relora",
    "relora_warmup_steps": "restart_warmup_steps",
    "jagged_restart_warmup_steps": "restart_warmup_steps",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "gradient_checkpointing": "activation_checkpointing",
}
"""Flags of ReLoRA's trainer by key of an axolotl file."""
