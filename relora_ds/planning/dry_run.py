"""What can be said about a run before it starts: the parameters and the memory of a dry run."""

from __future__ import annotations

from collections import Counter

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from relora_ds.accounting.flops import flops_per_token, kind_of, parameter_counts
from relora_ds.accounting.memory.model import matrix_state
from relora_ds.config.load import LoadedRun
from relora_ds.methods.build import meta_model, shard_over_ranks
from relora_ds.methods.interface import matrix_rules
from relora_ds.methods.registry import Phase, plan_phases
from relora_ds.parallel.topology import part_of_model
from relora_ds.parallel.zero import ZeroSettings
from relora_ds.planning.memory_report import closed_form, storage_plan

_ADAM_STATES = 2
_GB = 1e9
_HELD = ("weights", "indices", "gradients", "states")


def dry_run(run: LoadedRun, zero: ZeroSettings, console: Console) -> None:
    """Build every phase on the meta device and print what it trains. Nothing is allocated."""
    for phase in plan_phases(run.config):
        console.print(_parameter_table(run, phase))
        console.print(_memory(run, phase, zero), soft_wrap=True)
    console.print(
        f"ZeRO stage {zero.stage}, "
        f"{zero.global_batch_size} sequences of {run.config.train.seq_length} tokens "
        f"per step, {zero.accumulation} micro-batches per process, "
        f"{run.config.train.steps} steps"
    )


def _memory(run: LoadedRun, phase: Phase, zero: ZeroSettings) -> str:
    """The closed form on a GPU; what DeepSpeed's buffers add depends on the cluster."""
    plan = storage_plan(run.config, zero.stage, zero.dp_size, torch.device("cuda"))
    form = closed_form(run.config, run.architecture, phase.method, plan).as_dict()
    held = " + ".join(f"{name} {form[name] / _GB:.2f}" for name in _HELD if form[name])
    rest = ", ".join(f"{name} {n / _GB:.2f}" for name, n in form.items() if n and name not in _HELD)
    total = sum(form[name] for name in _HELD) / _GB
    return f"GB per process: {held} = {total:.2f}; besides {rest}"


def _parameter_table(run: LoadedRun, phase: Phase) -> Table:
    tp = part_of_model(run.config.parallel)
    model = meta_model(run.architecture, phase.method, run.config.train, tp)
    counts = parameter_counts(model)
    kept = _state_elements(run, phase, model)
    table = Table(
        title=f"{phase.name}: steps {phase.first_step + 1} to {phase.last_step}",
        caption=f"{flops_per_token(model, run.config.train.seq_length):.3g} FLOP per token",
    )
    table.add_column("part")
    for heading in ("frozen", "trainable", "optimizer"):
        table.add_column(heading, justify="right")
    for kind, (trainable, frozen) in counts.by_kind.items():
        table.add_row(kind, *_numbers(frozen, trainable, kept[kind]))
    table.add_section()
    table.add_row("total", *_numbers(counts.frozen, counts.trainable, kept.total()))
    size = run.config.parallel.tensor
    if size > 1:
        for module in model.modules():
            shard_over_ranks(module)
        held = list(model.parameters())
        trainable = sum(p.numel() for p in held if p.requires_grad)
        frozen = sum(p.numel() for p in held) - trainable
        kept = _state_elements(run, phase, model)
        table.add_row(f"one of {size} tensor ranks", *_numbers(frozen, trainable, kept.total()))
    return table


def _state_elements(run: LoadedRun, phase: Phase, model: nn.Module) -> Counter[str]:
    """Elements that optimizers keep of a model or of a tensor-parallel part, by kind."""
    tensor = run.config.parallel.tensor
    rules = matrix_rules(phase.method, run.config.optimizer, model)
    kept: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if (rule := rules.get(parameter)) is not None:
            held = matrix_state(parameter, rule, tensor=tensor)
            kept[kind_of(name)] += round(sum(elements for elements, _ in held))
        elif parameter.requires_grad:
            kept[kind_of(name)] += _ADAM_STATES * parameter.numel()
    return kept


def _numbers(*counts: int) -> list[str]:
    return [f"{n:,}" for n in counts]
