"""Rules between the fields of a run, and between a run and its model, whatever its method.

A rule is a generator whose parameters name the sections it reads; it yields what is wrong. It is
skipped while one of its sections is itself invalid, so one report can hold both kinds of problems.
`architecture` is the model's; all other names are sections of `RunConfig`. Rules that belong to
one method are methods of its settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from relora_ds.config.keys import run_keys
from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.model import ModelConfig, projection_shapes
from relora_ds.config.reading.document import Finding, Rule
from relora_ds.config.reading.suggest import did_you_mean
from relora_ds.config.sections import (
    CheckpointConfig,
    DataConfig,
    GuardsConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)


def find_problems(sections: Mapping[str, Any]) -> list[Finding]:
    """What breaks a rule, general or the method's own.

    Args:
        sections: the valid sections of a run by name, and `architecture` if the model is valid.
    """
    own = sections["method"].rules() if "method" in sections else ()
    return apply_rules((*RULES, *own), sections)


def find_doubts(sections: Mapping[str, Any]) -> list[Finding]:
    """What is allowed, but probably not meant.

    Args:
        sections: all sections of a run by name, and its `architecture`.
    """
    return apply_rules((*sections["method"].warnings(), *WARNINGS), sections)


def apply_rules(rules: Iterable[Rule], sections: Mapping[str, Any]) -> list[Finding]:
    """What all rules find whose parameters are among `sections`."""
    findings: list[Finding] = []
    for rule in rules:
        names = inspect.signature(rule).parameters
        if all(name in sections for name in names):
            findings += rule(**{name: sections[name] for name in names})
    return findings


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


def warmup_ends(
    train: TrainConfig, schedule: ScheduleConfig, method: MethodSettings
) -> Iterator[Finding]:
    before = method.warm_start.steps if method.warm_start else 0
    rest = train.steps - before
    if 0 < rest <= schedule.warmup_steps:
        phase = f"train.steps ({train.steps})"
        if before:
            # the schedule starts afresh, warm-up included, when the method takes over
            phase = f"the {rest} steps after method.warm_start_steps ({before})"
        yield Finding(
            ("schedule", "warmup_steps"),
            f"is {schedule.warmup_steps}, but must be less than {phase}: "
            "about a tenth of the steps is usual",
        )


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


def data_keys_match_source(data: DataConfig) -> Iterator[Finding]:
    if data.source == "builtin":
        for key in ("train", "valid", "valid_share", "tokenizer"):
            if getattr(data, key) is not None:
                fault = "is ignored with data.source builtin: remove it, or write source: files"
                yield Finding(("data", key), fault)
        return
    for key, other in (("train", ""), ("valid", ", or valid_share for a part of data.train")):
        if not getattr(data, key) and (key == "train" or data.valid_share is None):
            yield Finding(
                ("data", key),
                "is needed with data.source files: give the prefix that tools/prepare_data.py "
                f"wrote{other}, or write source: builtin to try things out",
            )
    if data.valid and data.valid_share:
        yield Finding(("data", "valid_share"), "is given beside data.valid: remove one of them")
    for key in ("builtin_vocab_size", "cache_dir"):
        # a default that is written out, as in a dumped run, does no harm
        if getattr(data, key) != DataConfig.model_fields[key].default:
            yield Finding(
                ("data", key),
                "is ignored with data.source files: remove it, or write source: builtin",
            )


def builtin_vocabulary_fits_model(data: DataConfig, architecture: ModelConfig) -> Iterator[Finding]:
    size, rows = data.builtin_vocab_size, architecture.vocab_size
    if data.source == "builtin" and size > rows:
        yield Finding(
            ("data", "builtin_vocab_size"),
            f"is {size}, but the model's vocab_size is {rows}: write {rows} or less",
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


def heads_divide_over_tensor(
    parallel: ParallelConfig, architecture: ModelConfig
) -> Iterator[Finding]:
    size, keys = parallel.tensor, architecture.num_key_value_heads
    for name, heads in (
        ("num_attention_heads", architecture.num_attention_heads),
        ("num_key_value_heads", keys),
    ):
        if heads % size:
            possible = [n for n in range(1, keys + 1) if not keys % n]
            yield Finding(
                ("parallel", "tensor"),
                f"is {size}, but must divide the model's {name} ({heads}): a head is not cut; "
                f"write {did_you_mean_number(size, possible)}",
            )
            return


def rank_fits_projections(method: MethodSettings, architecture: ModelConfig) -> Iterator[Finding]:
    shapes = projection_shapes(architecture)
    name = min(shapes, key=lambda projection: min(shapes[projection]))
    rows, columns = shapes[name]
    if method.low_rank is not None and method.low_rank >= min(rows, columns):
        yield Finding(
            ("method", "rank"),
            f"is {method.low_rank}, but must be less than both sides of every projection, and "
            f"{name.rpartition('.')[2]} is {rows} x {columns}: write less than "
            f"{min(rows, columns)}, a quarter of the hidden size is usual",
        )


def rank_divides_over_tensor(method: MethodSettings, parallel: ParallelConfig) -> Iterator[Finding]:
    rank = method.low_rank
    if parallel.low_rank_plan == "act" and rank is not None and rank % parallel.tensor:
        yield Finding(
            ("parallel", "low_rank_plan"),
            f"is act, which cuts method.rank ({rank}) into parallel.tensor "
            f"({parallel.tensor}) equal parts: use a multiple of {parallel.tensor} as the rank, or "
            "write fold",
        )


def did_you_mean_number(value: int, possible: Sequence[int]) -> str:
    """`4 or 8`: the largest possible number below `value` and the smallest above it."""
    below = [n for n in possible if n < value][-1:]
    above = [n for n in possible if n > value][:1]
    return " or ".join(str(n) for n in (*below, *above))


def tensor_parallelism_is_supported(
    parallel: ParallelConfig, train: TrainConfig
) -> Iterator[Finding]:
    size = parallel.tensor
    if parallel.sequence and size == 1:
        yield Finding(
            ("parallel", "sequence"),
            "is true, but parallel.tensor is 1: a sequence is cut over the processes that share a "
            "model; use false, or a larger parallel.tensor",
        )
    if parallel.sequence and train.seq_length % size:
        yield Finding(
            ("train", "seq_length"),
            f"is {train.seq_length}, but parallel.sequence cuts it into parallel.tensor ({size}) "
            f"equal parts: write {multiples_near(train.seq_length, size)}",
        )
    if parallel.tensor > 1 and train.per_layer_update:
        yield Finding(
            ("train", "per_layer_update"),
            f"is true, but parallel.tensor is {parallel.tensor}: the norm of a parameter's "
            "gradient is not known within the backward pass when it is cut; use one of the two",
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


def base_precision_has_a_use(train: TrainConfig, method: MethodSettings) -> Iterator[Finding]:
    if train.base_precision != "auto" and not method.has_frozen_base:
        yield Finding(
            ("train", "base_precision"),
            f"has no effect: method {method.name} has no frozen base weights",
        )


def matrices_are_trained(method: MethodSettings, optimizer: OptimizerConfig) -> Iterator[Finding]:
    if optimizer.matrix is None or method.trains_projections:
        return
    if optimizer.matrix == "muon" and method.warm_start is not None:
        return
    more = "" if optimizer.matrix == "scale" else ", or start with method.warm_start_steps"
    yield Finding(
        ("optimizer", "matrix"),
        f"is {optimizer.matrix}, which updates the weights of projections, but method "
        f"{method.name} does not train them: remove it, or use method.name=full{more}",
    )


def pairs_are_moved(method: MethodSettings, optimizer: OptimizerConfig) -> Iterator[Finding]:
    if optimizer.adapter is not None and not method.moves_pairs:
        yield Finding(
            ("optimizer", "adapter"),
            f"is {optimizer.adapter}, which updates both factors of a projection as one, but "
            f"method {method.name} has no factors, or edits vectors and moments of its own: remove "
            "it, or use method.name=lora, low_rank or sltrain",
        )


def pairs_are_cut_alike(
    method: MethodSettings, optimizer: OptimizerConfig, parallel: ParallelConfig
) -> Iterator[Finding]:
    rank, tensor = method.low_rank, parallel.tensor
    if optimizer.adapter is None or rank is None or tensor == 1:
        return
    if parallel.low_rank_plan == "fold" or rank % tensor:
        yield Finding(
            ("optimizer", "adapter"),
            f"is {optimizer.adapter}, which needs both factors cut over {tensor} tensor-parallel "
            "processes, but plan fold leaves one of them whole: use parallel.low_rank_plan=act and "
            f"a multiple of {tensor} as method.rank",
        )


def scaled_head_is_free(optimizer: OptimizerConfig, architecture: ModelConfig) -> Iterator[Finding]:
    if optimizer.matrix == "scale" and architecture.tie_word_embeddings:
        yield Finding(
            ("optimizer", "matrix"),
            "is scale, which normalises embedding and head along different dimensions, but the "
            "model ties them: write tie_word_embeddings: false in the model file, or use muon",
        )


RULES: tuple[Rule, ...] = (
    rank_fits_projections,
    rank_divides_over_tensor,
    sequence_fits_model,
    traced_steps_are_trained,
    micro_batch_divides_batch,
    warmup_ends,
    per_layer_update_has_optimizer,
    guards_can_decide_before_the_update,
    masters_can_be_left_out,
    data_keys_match_source,
    builtin_vocabulary_fits_model,
    precisions_agree,
    heads_divide_over_tensor,
    tensor_parallelism_is_supported,
    allowed_changes_are_keys,
    matrices_are_trained,
    pairs_are_moved,
    pairs_are_cut_alike,
    scaled_head_is_free,
)
WARNINGS: tuple[Rule, ...] = (base_precision_has_a_use,)
