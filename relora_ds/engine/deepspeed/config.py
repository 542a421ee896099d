"""The user's ZeRO JSON and our run description -> what DeepSpeed gets, and its settings. Pure.

DeepSpeed takes unknown top-level keys in silence and dies on "auto" with a TypeError, so every key
is checked here against what it knows and against what this trainer can stand behind. "auto" and
absent values are filled in from the run file, or are DeepSpeed's default; a value that contradicts
the run is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from relora_ds.config.reading.document import Document, Finding, KeyPath, key_name, show
from relora_ds.config.reading.source import read_json
from relora_ds.config.reading.suggest import did_you_mean
from relora_ds.config.rules.training import batch_divides_over_processes
from relora_ds.config.schema import RunConfig
from relora_ds.engine.deepspeed.reading.foreign import contradictions, in_our_words
from relora_ds.engine.deepspeed.reading.keys import (
    ALLOCATED,
    BF16_FIXED,
    BF16_KEYS,
    DATA_TYPE_KEYS,
    LARGEST_BUCKET,
    LARGEST_NUMBER,
    OFFLOAD_FIXED,
    ONLY_STAGES_1_AND_2,
    OWNED_KEYS,
    REFUSED_KEYS,
    TOP_CHOICES,
    TOP_KEYS,
    ZERO_FIXED,
    ZERO_KEYS,
    ZERO_REFUSED,
)
from relora_ds.engine.deepspeed.settings import is_off, read_settings
from relora_ds.errors import ConfigError
from relora_ds.parallel.zero import ZeroSettings

# Elements, not bytes. DeepSpeed's default of 5e8 allocates a gigabyte for gradients of adapters.
BUCKET_ELEMENTS = 50_000_000
# We log ourselves; DeepSpeed's line costs a device synchronisation
NEVER_PRINT = 2**31 - 1

_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "boolean": ("true or false", (bool,)),
    "number": ("a number", (int, float)),
    "text": ("text", (str,)),
    "section": ("an object", (dict,)),
}

_STAGE = ("zero_optimization", "stage")


class _Wanted(NamedTuple):
    value: Any
    reason: str | None = None  # why no other value will do; None leaves the user free


def resolve_deepspeed_config(
    source: str | Path | Mapping[str, Any],
    config: RunConfig,
    dp_size: int,
    *,
    trained_elements: int | None = None,
) -> ZeroSettings:
    """ZeRO's settings of a run, with the complete dictionary that DeepSpeed gets.

    Args:
        source: a ZeRO JSON file, or its content.
        config: the run.
        dp_size: data-parallel processes.
        trained_elements: trained parameters, if known: "auto" buckets need not be larger.

    Raises:
        ConfigError: the JSON cannot be read, has a key that is unknown, refused or of the wrong
            type, or contradicts the run; or the batch does not divide. Holds every problem.
    """
    if isinstance(source, Mapping):
        document = Document("DeepSpeed configuration", deepcopy(dict(source)))
    else:
        document = read_json(source)
    data = document.data
    findings = [*in_our_words(document), *contradictions(data, config)]
    findings += [*_check_keys(data), *_check_zero(data, config), *_check_bf16(data, config)]
    findings += [*_check_hpz(data, config, dp_size), *_check_islands(data, config)]
    values = {**_run_values(config, dp_size), **_bucket_values(trained_elements)}
    if _is_stage_3(data):
        # it replaces torch.nn.functional.linear for the rest of the process; ours saves x alone
        values["zero_optimization", "memory_efficient_linear"] = _Wanted(False)
    if config.train.per_layer_update:
        reason = "train.per_layer_update averages gradients in fp32"
        values["communication_data_type",] = _Wanted("fp32", reason)
    if _offloads_optimizer(data):
        values["zero_force_ds_cpu_optimizer",] = _Wanted(False, "optimizer.name chooses it")
    findings += [finding for item in values.items() for finding in _fill(data, *item)]
    # of several findings about one key the first is the most precise
    first = {finding.path: finding for finding in reversed(findings)}
    problems = document.problems + document.report(reversed(first.values()))
    for path, message in batch_divides_over_processes(config.train, dp_size):
        problems.append(f"{key_name(path)}: {message}")
    if problems:
        raise ConfigError(problems)
    # what is left of the refused blocks is switched off, or says what the run says
    foreign = REFUSED_KEYS.keys() | OWNED_KEYS
    resolved = {key: value for key, value in data.items() if key not in foreign}
    return read_settings(resolved, config.train.gradient_reduction)


def reduction_advice(zero: ZeroSettings) -> str | None:
    """What to say about gradients that are reduced more often than an update needs."""
    steps = zero.accumulation
    if zero.stage < 2 or steps == 1 or zero.reduces_once:
        return None
    if zero.offloads_optimizer:
        return (
            f"zero_optimization.offload_optimizer takes gradients to the host after each of {steps}"
            " micro-batches, so that they are reduced as often, whatever train.gradient_reduction "
            "says: a larger train.micro_batch_size needs fewer"
        )
    return (
        f"ZeRO stage {zero.stage} reduces gradients after each of {steps} micro-batches, "
        f"{steps} times the bytes of stage 1: train.gradient_reduction: step reduces them once, "
        "and keeps whole gradients of what is trained in between"
    )


def islands_advice(zero: ZeroSettings, islands: int) -> str | None:
    """What to say about islands whose processes send the same."""
    if islands == 1 or zero.stage > 0 or zero.dp_size == 1:
        return None
    return (
        f"ZeRO stage 0 keeps everything on every process, so that the {zero.dp_size} copies of "
        f"the model in an island all send the same to other islands: at stage 1 each of them sends "
        f"its slices, 1/{zero.dp_size} of it"
    )


def _run_values(config: RunConfig, dp_size: int) -> dict[KeyPath, _Wanted]:
    train = config.train
    micro, total, clip = train.micro_batch_size, train.global_batch_size, config.optimizer.clip
    accumulation = max(1, total // (micro * dp_size))
    return {
        ("train_batch_size",): _Wanted(total, f"train.global_batch_size is {total}"),
        ("train_micro_batch_size_per_gpu",): _Wanted(micro, f"train.micro_batch_size is {micro}"),
        ("gradient_accumulation_steps",): _Wanted(
            accumulation,
            f"train.global_batch_size / (train.micro_batch_size x {dp_size} processes) "
            f"is {accumulation}",
        ),
        ("gradient_clipping",): _Wanted(clip, f"optimizer.clip is {clip}"),
        ("bf16", "enabled"): _Wanted(
            train.precision == "bf16", f"train.precision is {train.precision}"
        ),
        ("gradient_allreduce_op",): _Wanted("mean", "gradients are means over the global batch"),
        ("zero_allow_untested_optimizer",): _Wanted(True, "this trainer brings its own optimizer"),
        ("steps_per_print",): _Wanted(NEVER_PRINT),
        _STAGE: _Wanted(0),
    }


def _offloads_optimizer(data: Mapping[str, Any]) -> bool:
    zero = data.get("zero_optimization")
    return isinstance(zero, dict) and not is_off(zero.get("offload_optimizer"))


def _is_stage_3(data: Mapping[str, Any]) -> bool:
    zero = data.get("zero_optimization")
    return isinstance(zero, dict) and _same(zero.get("stage"), 3)


def _bucket_values(trained_elements: int | None) -> dict[KeyPath, _Wanted]:
    elements = BUCKET_ELEMENTS
    if trained_elements is not None:
        elements = max(1, min(elements, trained_elements))
    names = ("reduce_bucket_size", "allgather_bucket_size")
    return {("zero_optimization", name): _Wanted(elements) for name in names}


def _fill(data: dict[str, Any], path: KeyPath, wanted: _Wanted) -> Iterator[Finding]:
    """Put a value where there is none or "auto"; another one is a conflict, if there is a reason"""
    section = data
    for part in path[:-1]:
        section = section.setdefault(str(part), {})
        if not isinstance(section, dict):
            return  # reported as a wrong type
    key = str(path[-1])
    given = section.setdefault(key, wanted.value)
    if given == "auto" and path != _STAGE:
        section[key] = wanted.value
    elif wanted.reason is not None and not _same(given, wanted.value):
        remedy = 'write "auto" or the same value, or remove the key'
        yield Finding(path, f"is {show(given)}, but {wanted.reason}: {remedy}")


def _same(given: object, value: object) -> bool:
    return given == value and isinstance(given, bool) == isinstance(value, bool)


def _check_keys(data: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in data.items():
        if key in TOP_KEYS:
            yield from _check_kind((key,), value, TOP_KEYS[key])
            choices = TOP_CHOICES.get(key)
            if choices and isinstance(value, str) and value not in (*choices, "auto"):
                yield Finding((key,), f"is {show(value)}, but must be {' or '.join(choices)}")
        elif key not in REFUSED_KEYS and key not in OWNED_KEYS:
            yield Finding((key,), f"unknown key; {did_you_mean(key, TOP_KEYS)}")
        elif key in REFUSED_KEYS and not is_off(value):
            yield Finding((key,), f"is refused: {REFUSED_KEYS[key]}")


def _check_zero(data: Mapping[str, Any], config: RunConfig) -> Iterator[Finding]:
    zero = data.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return
    stage = zero.get("stage", 0)
    if not any(_same(stage, known) for known in (0, 1, 2, 3)):
        yield Finding(_STAGE, f"is {show(stage)}, but must be 0, 1, 2 or 3")
    if config.train.per_layer_update and not _same(stage, 0):
        yield Finding(
            _STAGE,
            f"is {show(stage)}, but train.per_layer_update needs 0: later stages cut gradients "
            "over processes while they are reduced, so no whole one is left to update with; use "
            "stage 0, or stage 2 or 3 with a small reduce_bucket_size and per_layer_update: false",
        )
    unread = {} if any(_same(stage, other) for other in (1, 2)) else ONLY_STAGES_1_AND_2
    fixed = {key: value for key, value in ZERO_FIXED.items() if key not in unread}
    yield from _check_section("zero_optimization", zero, ZERO_KEYS, fixed)
    yield from _check_offload(zero, config)


def _check_offload(zero: Mapping[str, Any], config: RunConfig) -> Iterator[Finding]:
    for key, reason in ZERO_REFUSED.items():
        if key in zero and not is_off(zero[key]):
            yield Finding(("zero_optimization", key), f"is refused: {reason}")
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key)
        if not isinstance(offload, dict) or is_off(offload):
            continue
        if offload.get("device") != "cpu":
            yield Finding(
                ("zero_optimization", key, "device"),
                f'is {show(offload.get("device"))}, but only "cpu" and "none" are supported',
            )
        for name, (allowed, reason) in OFFLOAD_FIXED.items():
            if not _same(offload.get(name, allowed), allowed):
                yield Finding(
                    ("zero_optimization", key, name),
                    f"is {show(offload[name])}, but must be {show(allowed)} or absent: {reason}",
                )
    if not is_off(zero.get("offload_param")) and not _same(zero.get("stage"), 3):
        yield Finding(
            ("zero_optimization", "offload_param"),
            "needs zero_optimization.stage 3: change the stage, or remove it",
        )
    known = ("adamw", "cpu_adam")
    if not is_off(zero.get("offload_optimizer")) and config.optimizer.name not in known:
        yield Finding(
            ("zero_optimization", "offload_optimizer"),
            f"needs optimizer.name adamw or cpu_adam, and it is {config.optimizer.name}: "
            "change it, or remove the offload",
        )


def _check_hpz(data: Mapping[str, Any], config: RunConfig, dp_size: int) -> Iterator[Finding]:
    """A second copy of the weights is cut over this many consecutive processes."""
    zero = data.get("zero_optimization")
    size = zero.get("zero_hpz_partition_size", 1) if isinstance(zero, dict) else 1
    if not isinstance(zero, dict) or not isinstance(size, int) or size == 1:
        return
    path: KeyPath = ("zero_optimization", "zero_hpz_partition_size")
    if not _is_stage_3(data):
        yield Finding(path, f"is {show(size)}, but needs stage 3: change the stage, or remove it")
    elif size < 1 or dp_size % size:
        yield Finding(
            path,
            f"is {show(size)}, but must divide the {dp_size} processes: give it the processes of "
            "one node",
        )
    elif config.parallel.tensor > 1:
        yield Finding(path, "does not go with parallel.tensor > 1 in DeepSpeed: remove one of them")


def _check_islands(data: Mapping[str, Any], config: RunConfig) -> Iterator[Finding]:
    """Options under which gradients or norms are elsewhere when islands come to average them."""
    if config.parallel.islands == 1:
        return
    zero, types = data.get("zero_optimization"), data.get("data_types")
    zero = zero if isinstance(zero, dict) else {}
    types = types if isinstance(types, dict) else {}
    given: dict[KeyPath, bool] = {
        ("zero_optimization", key): not is_off(zero.get(key))
        for key in ("offload_optimizer", "offload_param")
    }
    hpz, sums = zero.get("zero_hpz_partition_size"), types.get("grad_accum_dtype")
    given["zero_optimization", "zero_hpz_partition_size"] = hpz not in (None, "auto", 1)
    given["data_types", "grad_accum_dtype"] = sums not in (None, "auto", config.train.precision)
    for path in (path for path, is_given in given.items() if is_given):
        yield Finding(
            path,
            f"is given, but parallel.islands is {config.parallel.islands}, with which it has not "
            "been made to work: remove one of them",
        )


def _check_bf16(data: Mapping[str, Any], config: RunConfig) -> Iterator[Finding]:
    block = data.get("bf16")
    if isinstance(block, dict):
        yield from _check_section("bf16", block, BF16_KEYS, BF16_FIXED)
    types = data.get("data_types")
    if not isinstance(types, dict):
        return
    yield from _check_section("data_types", types, DATA_TYPE_KEYS, {})
    given, zero = types.get("grad_accum_dtype"), data.get("zero_optimization")
    if given in (None, config.train.precision):
        return  # what DeepSpeed does by itself
    path = ("data_types", "grad_accum_dtype")
    stage_1 = isinstance(zero, dict) and _same(zero.get("stage"), 1)
    if given != "fp32" or not stage_1 or _offloads_optimizer(data):
        yield Finding(
            path,
            f"is {show(given)}, but only fp32 in a bf16 run at zero_optimization.stage 1 without "
            "offload is supported (DeepSpeed's BF16_Optimizer): change the stage, or remove it",
        )
    elif config.parallel.tensor > 1:
        yield Finding(path, "is fp32, which needs parallel.tensor 1: remove one of them")


def _check_section(
    name: str,
    section: Mapping[str, Any],
    kinds: Mapping[str, str],
    fixed: Mapping[str, tuple[bool | int, str]],
) -> Iterator[Finding]:
    for key, value in section.items():
        if key not in kinds:
            yield Finding((name, key), f"unknown key; {did_you_mean(key, kinds)}")
        elif not _is_kind(value, kinds[key]) and value is not None:
            yield from _check_kind((name, key), value, kinds[key])
        elif kinds[key] == "number" and isinstance(value, (int, float)) and value < 0:
            yield Finding((name, key), f"is {show(value)}, but must not be negative")
        elif kinds[key] == "number" and isinstance(value, (int, float)) and value > _limit(key):
            yield Finding((name, key), f"is {show(value)}, but must be at most {_limit(key)}")
        elif key in fixed and value is not None and not _same(value, fixed[key][0]):
            allowed, reason = fixed[key]
            yield Finding(
                (name, key), f"is {show(value)}, but must be {show(allowed)} or absent: {reason}"
            )


def _limit(key: str) -> int:
    """The largest number that a key may hold."""
    return LARGEST_BUCKET if key in ALLOCATED else LARGEST_NUMBER


def _check_kind(path: KeyPath, value: object, kind: str) -> Iterator[Finding]:
    if not _is_kind(value, kind) and value != "auto":
        yield Finding(path, f"is {show(value)}, but must be {_KINDS[kind][0]}")


def _is_kind(value: object, kind: str) -> bool:
    if kind == "number" and isinstance(value, bool):
        return False
    if isinstance(value, float) and not math.isfinite(value):  # JSON's 1e999 is infinite
        return False
    return isinstance(value, _KINDS[kind][1])
