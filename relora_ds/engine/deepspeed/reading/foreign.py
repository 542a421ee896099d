"""ZeRO JSONs as other trainers ship them: what they say in other words, or leave to the run file.

Transformers and the projects around it write "auto" where the run decides, DeepSpeed's field names
beside its aliases, comments as keys, and blocks for the optimizer and the schedule. Each of these
has one meaning, so that such a file is taken as it is; a value that contradicts the run is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from relora_ds.config.reading.document import Document, Finding, KeyPath, show
from relora_ds.config.schema import RunConfig
from relora_ds.engine.deepspeed.reading.keys import TOP_KEYS, ZERO_KEYS

_PREFIX = "stage3_"
_FIELD_NAMES = {
    key.removeprefix(_PREFIX): key
    for key in ZERO_KEYS
    if key.startswith(_PREFIX) and key != "stage3_gather_fp16_weights_on_model_save"
}
"""Names of DeepSpeed's fields, which it accepts as well, and the spelling that we go on with."""
_ADAM = ("Adam", "AdamW")
_ANY = object()


def in_our_words(document: Document) -> list[Finding]:
    """Rewrite a document so that every key has one spelling and nothing is left to be filled in.

    Comments go, field names become aliases, and "auto" goes wherever the run or DeepSpeed's default
    gives the value; `zero_optimization.stage` alone has none.

    Returns:
        Keys that were given twice.
    """
    data = document.data
    for key in [key for key in data if key.startswith(("_", "//", "#"))]:
        del data[key]
    findings = list(_rename(document))
    for key in [key for key in data if key in TOP_KEYS]:
        if data[key] == "auto":
            del data[key]
        else:
            _without_auto(data[key], (key,))
    return findings


def contradictions(data: Mapping[str, Any], config: RunConfig) -> Iterator[Finding]:
    """What the blocks `optimizer` and `scheduler` say that the run file says otherwise.

    A block that agrees with the run, or leaves everything to it, needs no word.
    """
    for name, types, values, owner in (
        ("optimizer", _ADAM, _optimizer_values(config), "optimizer.*"),
        ("scheduler", None, _schedule_values(config), "schedule.*"),
    ):
        block = data.get(name)
        if isinstance(block, dict):
            remedy = f"the run file owns it: set {owner} there and remove this block"
            yield from _compare(name, block, types, values, remedy)
        elif block is not None:
            yield Finding((name,), f"is {show(block)}, but must be an object")


def _rename(document: Document) -> Iterator[Finding]:
    zero = document.data.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    for name in [name for name in zero if name in _FIELD_NAMES]:
        alias, value = _FIELD_NAMES[name], zero.pop(name)
        old, new = (("zero_optimization", key) for key in (name, alias))
        if alias in zero and zero[alias] != value:
            yield Finding(
                old, f"is {show(value)}, but {alias} is {show(zero[alias])}: remove one of them"
            )
        elif alias not in zero:
            zero[alias] = value
            if old in document.places:
                document.places[new] = document.places[old]


def _without_auto(section: object, path: KeyPath) -> None:
    if not isinstance(section, dict):
        return
    for key in list(section):
        if section[key] == "auto" and (*path, key) != ("zero_optimization", "stage"):
            del section[key]
            if key == "device":
                section[key] = "none"  # DeepSpeed's default; without it a block would offload
        else:
            _without_auto(section[key], (*path, key))


def _compare(
    name: str,
    block: Mapping[str, Any],
    types: tuple[str, ...] | None,
    values: Mapping[str, Any],
    remedy: str,
) -> Iterator[Finding]:
    """Findings about a block of a type and its parameters.

    Args:
        types: those whose function is the run's; None for any, which "auto" parameters fill.
        values: what each parameter is in the run.
        remedy: ends each message.
    """
    kind, params = block.get("type"), block.get("params", {})
    if types is not None and kind not in (*types, "auto", None):
        yield Finding((name, "type"), f"is {show(kind)}: {remedy}")
        return
    if not isinstance(params, dict) or set(block) - {"type", "params"}:
        yield Finding((name,), f"holds more than a type and its params: {remedy}")
        return
    for key, value in params.items():
        known = values.get(key)
        if value == "auto" or known is _ANY:
            continue
        if key not in values:
            yield Finding((name, "params", key), f"is {show(value)}: {remedy}")
        elif value != known:
            yield Finding(
                (name, "params", key), f"is {show(value)}, but it is {show(known)} here: {remedy}"
            )
    if types is None and not params and kind is not None:
        yield Finding((name, "type"), f"is {show(kind)}: {remedy}")


def _optimizer_values(config: RunConfig) -> dict[str, Any]:
    optimizer = config.optimizer
    return {
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "adam_w_mode": True,
        "bias_correction": True,
        "amsgrad": False,
        "torch_adam": _ANY,  # which implementation computes it
        "fused": _ANY,
        "foreach": _ANY,
    }


def _schedule_values(config: RunConfig) -> dict[str, Any]:
    schedule = config.schedule
    return {
        "warmup_min_lr": 0,
        "warmup_max_lr": config.optimizer.lr,
        "warmup_num_steps": schedule.warmup_steps,
        "total_num_steps": config.train.steps,
        "warmup_type": "linear",
        "warmup_min_ratio": 0,
        "cos_min_ratio": schedule.min_lr_ratio,
        "last_batch_iteration": -1,
    }
