"""What can be said about a run before it starts: the parameter table of a dry run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from relora_ds.config.load import LoadedRun
from relora_ds.methods.registry import Phase, plan_phases
from relora_ds.model.flops import flops_per_token, parameter_counts
from relora_ds.parallel.topology import part_of_model
from relora_ds.train.build import cut_over_ranks, meta_model

_ADAM_STATES = 2


def dry_run(run: LoadedRun, deepspeed_config: dict[str, Any], console: Console) -> None:
    """Build every phase on the meta device and print what it trains. Nothing is allocated."""
    for phase in plan_phases(run.config):
        console.print(_parameter_table(run, phase))
    console.print(
        f"ZeRO stage {deepspeed_config['zero_optimization']['stage']}, "
        f"{deepspeed_config['train_batch_size']} sequences of {run.config.train.seq_length} tokens "
        f"per step, {deepspeed_config['gradient_accumulation_steps']} micro-batches per process, "
        f"{run.config.train.steps} steps: the configuration is valid"
    )


def _parameter_table(run: LoadedRun, phase: Phase) -> Table:
    tensor = part_of_model(run.config.parallel)
    model = meta_model(run.architecture, phase.method, run.config.train, tensor)
    counts = parameter_counts(model)
    table = Table(
        title=f"{phase.name}: steps {phase.first_step + 1} to {phase.last_step}",
        caption=f"{flops_per_token(model, run.config.train.seq_length):.3g} FLOP per token",
    )
    table.add_column("part")
    for heading in ("frozen", "trainable", "optimizer"):
        table.add_column(heading, justify="right")
    for kind, (trainable, frozen) in counts.by_kind.items():
        table.add_row(kind, *_numbers(frozen, trainable))
    table.add_section()
    table.add_row("total", *_numbers(counts.frozen, counts.trainable))
    size = run.config.parallel.tensor
    if size > 1:
        for module in model.modules():
            cut_over_ranks(module)
        held = list(model.parameters())
        trainable = sum(p.numel() for p in held if p.requires_grad)
        frozen = sum(p.numel() for p in held) - trainable
        table.add_row(f"one of {size} tensor ranks", *_numbers(frozen, trainable))
    return table


def _numbers(frozen: int, trainable: int) -> list[str]:
    return [f"{n:,}" for n in (frozen, trainable, _ADAM_STATES * trainable)]
