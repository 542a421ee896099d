"""Rules on steps, batches, sequences, precisions and guards."""

from __future__ import annotations

from collections.abc import Iterator

from relora_ds.config.keys import run_keys
from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.model import ModelConfig
from relora_ds.config.reading.document import Finding
from relora_ds.config.reading.suggest import did_you_mean
from relora_ds.config.sections import (
    CheckpointConfig,
    GuardsConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
)


def multiples_near(value: int, divisor: int) -> str:
    """`96 or 128`: the multiples of `divisor` around `value`, the lower one if it is positive."""
    lower = value // divisor * divisor
    return f"{lower} or {lower + divisor}" if lower else str(divisor)


def sequence_fits_model(train: TrainConfig, architecture: ModelConfig) -> Iterator[Finding]:
    longest = architecture.max_position_embeddings
    if train.seq_length > longest:
        yield Finding(
            ("train", "seq_length"),
            f"is {train.seq_length}, but the model's max_position_embeddings is {longest}: "
            "shorten the sequence or raise it in the model file",
        )


def traced_steps_are_trained(log: LogConfig, train: TrainConfig) -> Iterator[Finding]:
    if log.profile is None:
        return
    first, last = log.profile
    if first > last:
        yield Finding(("log", "profile"), f"is [{first}, {last}]: write the earlier step first")
    elif first > train.steps:
        yield Finding(
            ("log", "profile"),
            f"is [{first}, {last}], but train.steps is {train.steps}: trace earlier steps",
        )


def micro_batch_divides_batch(train: TrainConfig) -> Iterator[Finding]:
    micro, total = train.micro_batch_size, train.global_batch_size
    if total % micro:
        yield Finding(
            ("train", "global_batch_size"),
            f"is {total}, but must be a multiple of train.micro_batch_size ({micro}): "
            f"write {multiples_near(total, micro)}",
        )


def batch_divides_over_processes(train: TrainConfig, processes: int) -> Iterator[Finding]:
    """For the launch, which alone knows the data-parallel size `processes`."""
    micro, total = train.micro_batch_size, train.global_batch_size
    if total % micro == 0 and total % (micro * processes):
        yield Finding(
            ("train", "global_batch_size"),
            f"is {total}, but must be a multiple of {micro * processes} = train.micro_batch_size "
            f"({micro}) x data-parallel processes ({processes}): "
            f"write {multiples_near(total, micro * processes)}, or {_same_batch(train, processes)}",
        )


def _same_batch(train: TrainConfig, processes: int) -> str:
    """What to set so that `processes`, or fewer, share the global batch as it is."""
    total = train.global_batch_size
    fitting = _largest_divisor(total, processes)
    micro = _largest_divisor(total // fitting, train.micro_batch_size)
    keep = f"train.micro_batch_size={micro} for the same batch"
    if fitting == processes:
        return f"set {keep}"
    return f"start {fitting} data-parallel processes with {keep}"


def _largest_divisor(value: int, limit: int) -> int:
    return next(each for each in range(min(limit, value), 0, -1) if value % each == 0)


def per_layer_update_has_optimizer(
    train: TrainConfig, optimizer: OptimizerConfig
) -> Iterator[Finding]:
    if train.per_layer_update and not optimizer.is_ours:
        yield Finding(
            ("train", "per_layer_update"),
            f"is true, but only optimizer.name adamw updates one parameter at a time, and it is "
            f"{optimizer.name}: use adamw, or write false",
        )


def guards_can_decide_before_the_update(
    guards: GuardsConfig, train: TrainConfig
) -> Iterator[Finding]:
    if not (guards.decides_before_update and train.per_layer_update):
        return
    spike = guards.loss_spike.action
    key, value = ("non_finite",), guards.non_finite
    if guards.non_finite == "stop":
        key, value = ("loss_spike", "action"), spike
    default = "stop" if guards.non_finite != "stop" else "off"
    yield Finding(
        ("guards", *key),
        f"is {value}, but train.per_layer_update applies updates within the backward pass, before "
        f"the loss and all gradients are known: write {default}, or per_layer_update: false",
    )


def masters_can_be_left_out(train: TrainConfig) -> Iterator[Finding]:
    if train.master_weights:
        return
    if train.precision == "fp32":
        yield Finding(
            ("train", "master_weights"),
            "is false, but train.precision is fp32, where weights are their own masters: remove "
            "it, or write precision: bf16",
        )
    elif not train.per_layer_update:
        yield Finding(
            ("train", "master_weights"),
            "is false, but DeepSpeed updates fp32 copies of bf16 weights at every stage: write "
            "train.per_layer_update: true, which stands in for it at stage 0, or remove it",
        )


def precisions_agree(train: TrainConfig) -> Iterator[Finding]:
    if train.precision == "fp32" and train.base_precision.startswith("bf16"):
        yield Finding(
            ("train", "base_precision"),
            f"is {train.base_precision}, but train.precision is fp32: write auto or fp32",
        )
    if train.precision == "fp32" and train.attention in ("flash", "fa4", "cudnn"):
        yield Finding(
            ("train", "attention"),
            f"is {train.attention}, which needs train.precision bf16, but that is fp32: "
            "write auto or sdpa",
        )


def base_precision_has_a_use(train: TrainConfig, method: MethodSettings) -> Iterator[Finding]:
    if train.base_precision != "auto" and not method.has_frozen_base:
        yield Finding(
            ("train", "base_precision"),
            f"has no effect: method {method.name} has no frozen base weights",
        )


def allowed_changes_are_keys(checkpoint: CheckpointConfig) -> Iterator[Finding]:
    for index, key in enumerate(checkpoint.allow_change):
        if key not in run_keys():
            sections = {name.partition(".")[0] for name in run_keys()}
            section = key.partition(".")[0]
            near = {name for name in run_keys() if name.startswith(f"{section}.")} or sections
            yield Finding(
                ("checkpoint", "allow_change", index),
                f'is "{key}", but must be a key of the run file; '
                f"{did_you_mean(key, near, run_keys())}",
            )
