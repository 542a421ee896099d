"""From a command line or a file of another trainer to a run file of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_ds.config.load import check_draft
from relora_ds.config.reading.document import Document, Place, shorten
from relora_ds.config.reading.source import dump_yaml, parse_value, read_yaml
from relora_ds.errors import ConfigError
from relora_ds.planning.foreign.flags import Flags, is_on
from relora_ds.planning.foreign.trainers import AXOLOTL, TRAINERS, Notes, Trainer

_PROCESSES = {"nproc_per_node", "nproc-per-node", "num_gpus"}
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}
_TEXTS = {"model", "output_dir", "train.init_from"}
"""Keys whose value is text, whatever it looks like."""
_LONGEST_NOTE = 500


@dataclass(frozen=True)
class Converted:
    """A run in our words."""

    run: dict[str, Any]
    """Content of the run file."""
    notes: list[str]
    """What has no meaning here or another one, a line each."""

    def __str__(self) -> str:
        notes = "".join(f"# {shorten(note, _LONGEST_NOTE)}\n" for note in self.notes)
        return notes + dump_yaml(self.run)

    def check(self) -> None:
        """Make sure that the run will load, once the files that it names are there.

        Raises:
            ConfigError: the flags say something that no run may be; names every such key.
        """
        check_draft(Document("the converted run", self.run))


def convert_command(words: Sequence[str], trainer: str | None = None) -> Converted:
    """Convert a command line.

    Args:
        words: of it, the launcher's among them; flags with one or two dashes, `--x y` or `--x=y`.
        trainer: a key of `TRAINERS`; None to tell by the flags.

    Raises:
        ConfigError: no trainer has such flags, or a value cannot be read.
    """
    notes = Notes()
    flags, processes = _flags(words, notes)
    name = trainer or _trainer_of(flags)
    converted = _convert(flags, TRAINERS[name], processes)
    return Converted(converted.run, [*converted.notes, *notes])


def convert_axolotl(path: Path, processes: int) -> Converted:
    """Convert an axolotl file.

    Args:
        path: the file.
        processes: that it runs on; a batch there is counted per process.

    Raises:
        ConfigError: it cannot be read.
    """
    found, notes = read_yaml(path).data, Notes()
    flags: dict[str, str] = {"use_peft": str(found.get("adapter") in ("lora", "qlora")).lower()}
    pruned = {"magnitude": "optimizer_magnitude_pruning", "random": "optimizer_random_pruning"}
    kind = pruned.get(str(found.get("relora_prune_method", "magnitude")))
    for key, value in found.items():
        if key in AXOLOTL and value is not None:
            flags[AXOLOTL[key]] = str(value)
        elif key == "relora_prune_ratio" and kind is not None:
            flags[kind] = str(value)
        elif key not in ("relora", "adapter", "relora_prune_method", "bf16", "optimizer"):
            notes.append(f"{key}: has no meaning here")
    if not is_on(str(found.get("relora", "relora" in flags))):
        flags.pop("relora", None)
    converted = _convert(Flags(flags), TRAINERS["relora"], processes)
    return Converted(converted.run, [*converted.notes, *notes])


def _flags(words: Sequence[str], notes: Notes) -> tuple[Flags, int]:
    """Values by flag, and the number of processes that the launcher starts."""
    found: dict[str, str] = {}
    waiting: str | None = None
    for word in words:
        match = re.fullmatch(r"--?([A-Za-z_][\w-]*)(?:=(.*))?", word, re.DOTALL)
        if match is not None:
            waiting = str(match[1])
            found[waiting] = match[2] if match[2] is not None else "true"
        elif waiting is not None:
            found[waiting] = word
            waiting = None
    processes = 1
    for name in _PROCESSES & found.keys():
        started = found.pop(name)
        if started.isdecimal() and int(started):
            processes = int(started)
        else:  # torchrun counts devices itself
            notes.append(f"{name} {started}: does not say how many; one process is assumed")
    for name in ("standalone", "master_port", "master-port", "nnodes", "m"):
        found.pop(name, None)
    return Flags(found), processes


def _trainer_of(flags: Flags) -> str:
    marks = {
        "switchlora": {"switch_lora", "use_lora", "lora_rank"},
        "sltrain": {"peft_model", "sp_ratio", "update_proj_gap", "galore_scale", "grad_clipping"},
        "relora": {
            "relora",
            "use_peft",
            "lora_r",
            "reset_optimizer_on_relora",
            "restart_warmup_steps",
        },
    }
    found = [name for name, own in marks.items() if own & flags.keys()]
    if len(found) != 1:
        raise ConfigError(
            f"the flags are those of {' and of '.join(found) if found else 'no trainer known here'}"
            f": name one with --trainer, of {', '.join(TRAINERS)}"
        )
    return found[0]


def _convert(given: Flags, trainer: Trainer, processes: int) -> Converted:
    notes = Notes()
    flags = Flags({**trainer.defaults, **given})
    for name in given:
        if name in trainer.dropped:
            notes.append(f"{name}: {trainer.dropped[name]}")
        elif name not in trainer.keys and name not in trainer.derived:
            notes.append(f"{name}: is not known here, and is left out")
    return Converted(_run(flags, trainer, processes, notes), notes)


def _run(flags: Flags, trainer: Trainer, processes: int, notes: Notes) -> dict[str, Any]:
    run: dict[str, Any] = {
        "output_dir": "runs/converted",
        "model": "configs/model/llama_60m.json",
        "deepspeed": "configs/zero/zero2.json",
        "method": trainer.method(flags, notes),
        "data": {"train": "data/train", "valid": "data/valid", "tokenizer": "data/tokenizer.model"},
    }
    notes.append("data: write the files with `relora-ds prepare-data`, and name them here")
    for flag, key in trainer.keys.items():
        if flag in flags:
            section, _, name = key.rpartition(".")
            target = run.setdefault(section, {}) if section else run
            target[name] = flags[flag] if key in _TEXTS else _value(flag, flags[flag])
    if "model_config" not in flags:
        notes.append("model: name a file with the keys of a Hugging Face config.json")
    train = run.setdefault("train", {})
    train["global_batch_size"] = _global_batch(flags, processes, notes)
    train["precision"] = "fp32" if "32" in (flags.get("dtype") or "") else "bf16"
    if "max_train_tokens" in flags:
        per_step = train["global_batch_size"] * flags.whole("max_length")
        train["steps"] = math.ceil(_tokens(flags["max_train_tokens"]) / per_step)
    _optimizer(flags, run, notes)
    if "scheduler" in flags:
        name = flags["scheduler"].removesuffix("_restarts")
        run.setdefault("schedule", {})["name"] = (
            name if name in ("linear", "constant") else "cosine"
        )
    return run


def _optimizer(flags: Flags, run: dict[str, Any], notes: Notes) -> None:
    name, optimizer = flags.text("optimizer").lower(), run.setdefault("optimizer", {})
    if "per_layer" in name:
        run["train"]["per_layer_update"] = True
        run["deepspeed"] = "configs/zero/zero0.json"
    if "8bit" in name:
        optimizer["name"] = "adamw8bit"
    elif not any(known in name for known in ("adam", "galore")):
        notes.append(f"optimizer {name}: is not offered, AdamW is used")
    optimizer["betas"] = [flags.real("adam_beta1", 0.9), flags.real("adam_beta2", 0.999)]


def _global_batch(flags: Flags, processes: int, notes: Notes) -> int:
    if "total_batch_size" in flags:
        return flags.whole("total_batch_size")
    batch = flags.whole("batch_size") * flags.whole("gradient_accumulation", 1) * processes
    notes.append(f"global_batch_size {batch}: batch x accumulation x {processes} processes")
    return batch


def _value(flag: str, text: str) -> Any:
    """A flag's value as a run file has it.

    Raises:
        ConfigError: a run file has no such value.
    """
    return parse_value(text, Place(f"the flag {flag}"))


def _tokens(text: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*)([KMB]?)", text.strip().upper(), re.ASCII)
    if match is None:
        raise ConfigError(f"the flag max_train_tokens is {text}: write a number such as 100M or 2B")
    return float(match[1]) * _UNITS[match[2]]
