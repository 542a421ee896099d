"""Time of a training step by method, rank and formulation. See --help.

All cases take turns in one process, step by step, so that what else the machine does hits all
alike. On a CPU the processor's time counts, on a GPU the time between events; medians are reported.

`bound_to_full` is what operations allow: those of the projections of full rank over those of the
case, with T tokens per micro-batch, K micro-batches and an (m, n) projection of rank r

    full                   6 K T m n
    relora, switchlora     4 K T m n + 2 m n r + K min(4 T r (m + n), 2 T m n + 4 m n r)
    sltrain                6 K T m n + 2 m n r + 4 K m n r
    low_rank               6 K T r (m + n)

Events are not timed: merges, switches, and galore's refreshes. galore has no bound here, and muon
and scale, which are full rank with another optimizer, have that of full rank.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from relora_ds.cli.parser import run_tool, tool_parser
from relora_ds.config.model import ModelConfig, projection_shapes
from relora_ds.config.schema import RunConfig
from relora_ds.numerics.dtypes import DTYPES

_EXAMPLE = """
example:
  python benchmarks/step.py --hidden 384 --ffn 1024 --layers 6 --heads 6 --vocab 2048 --batch 8 \\
    --seq 128 --methods full relora switchlora sltrain low_rank --ranks 96 32 --json step.json
"""
_METHODS = ("full", "lora", "relora", "switchlora", "sltrain", "low_rank", "galore")
_MATRIX_OPTIMIZERS = ("muon", "scale")
_FORMULATIONS = ("auto", "split", "layer", "step")
_WARM = 2
_TIMEOUT_MINUTES = 5.0


@dataclass(frozen=True)
class StepCase:
    """What is timed.

    Args:
        method: name of a method, "transformers", or the optimizer of a full-rank run.
        rank: of its factors; None at full rank.
        formulation: `train.formulation`.
        pad_mlp: `train.pad_mlp`.
    """

    method: str
    rank: int | None
    formulation: str
    pad_mlp: str


@dataclass(frozen=True)
class Figures:
    """What is reported of a case. Times are medians in ms; ratios are times faster."""

    method: str
    rank: int | None
    formulation: str
    pad_mlp: str
    step_ms: float
    forward_backward_ms: float
    optimizer_ms: float
    tokens_per_second: float
    ratio_to_full: float | None
    bound_to_full: float | None
    ratio_to_transformers: float | None
    peak_bytes: int | None


def main() -> None:
    parser = tool_parser(__doc__, _EXAMPLE)
    for name, default in (("hidden", 384), ("ffn", 1024), ("layers", 6), ("heads", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("vocab", 2048), ("batch", 8), ("seq", 128), ("accumulation", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    names = (*_METHODS, *_MATRIX_OPTIMIZERS)
    parser.add_argument("--methods", nargs="+", choices=names, default=list(_METHODS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[96, 32])
    parser.add_argument("--formulations", nargs="+", choices=_FORMULATIONS, default=["auto"])
    parser.add_argument("--pad-mlp", nargs="+", choices=("auto", "on", "off"), default=["auto"])
    parser.add_argument("--adapter", choices=("spectral",), help="updates pairs of factors")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=1, help="of ZeRO")
    parser.add_argument("--repeat", type=int, default=9, help="timed steps of each case")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers")
    parser.add_argument("--compile", action="store_true", help="train.compile: layers, in ours")
    parser.add_argument("--no-transformers", action="store_true", help="leave that case out")
    beside = "in place of steps, time projections beside the authors' layers: DIR has their clones"
    parser.add_argument("--against", type=Path, metavar="DIR", help=beside)
    parser.add_argument("--json", type=Path, help="file for the figures, one object per case")
    parsed = parser.parse_args()
    if parsed.against:
        return _against(parsed)
    figures = benchmark_steps(parsed)
    print(*table(figures), sep="\n")
    if parsed.json:
        parsed.json.write_text(json.dumps([asdict(each) for each in figures], indent=1) + "\n")


def _against(parsed: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of `benchmarks` as a package
    from benchmarks.peers import projection

    tokens, dtype = parsed.batch * parsed.seq, DTYPES[parsed.precision]
    rows = projection.compare(parsed.against, tokens, parsed.repeat, dtype, Clock(_device()))
    for line in projection.table(rows):
        print(line)
    if parsed.json:
        parsed.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def benchmark_steps(parsed: argparse.Namespace) -> list[Figures]:
    """Time all cases.

    Args:
        parsed: the command line.
    """
    cases = list(_cases(parsed))
    clock = Clock(_device())
    steppers: dict[StepCase, Callable[[int], Timed]] = {}
    for case in cases:
        steppers[case] = _stepper(case, parsed, clock)
    times: dict[StepCase, list[Timed]] = {case: [] for case in cases}
    gc.collect()
    gc.disable()  # a collection would hit one case alone
    for step in range(_WARM + parsed.repeat):
        for case, stepper in steppers.items():
            times[case].append(stepper(step))
    gc.enable()
    timed = {case: found[_WARM:] for case, found in times.items()}
    return [_figures(case, timed, parsed) for case in cases]


def _cases(parsed: argparse.Namespace) -> Iterator[StepCase]:
    if not parsed.no_transformers:
        yield StepCase("transformers", None, "dense", "off")
    for method, pads in itertools.product(parsed.methods, parsed.pad_mlp):
        if method == "full" or method in _MATRIX_OPTIMIZERS:
            yield StepCase(method, None, "dense", pads)
            continue
        # the factors of low_rank are all there is, and galore composes nothing
        forms = ("split",) if method in ("low_rank", "galore") else parsed.formulations
        for rank in parsed.ranks:
            yield from (StepCase(method, rank, form, pads) for form in forms)


def bound(case: StepCase, parsed: argparse.Namespace) -> float | None:
    """Times faster than full rank that operations allow, for the projections alone."""
    if case.rank is None or case.method == "galore":
        return 1.0 if case.method == "full" or case.method in _MATRIX_OPTIMIZERS else None
    tokens, times, r = parsed.batch * parsed.seq, parsed.accumulation, case.rank
    full = own = 0.0
    for m, n in projection_shapes(_architecture(parsed)).values():
        full += 6 * times * tokens * m * n
        low_rank = 4 * tokens * r * (m + n)
        if case.method == "low_rank":
            own += 6 * times * tokens * r * (m + n)
        elif case.method == "sltrain":
            own += 6 * times * tokens * m * n + 2 * m * n * r + 4 * times * m * n * r
        else:
            gradients = min(low_rank, 2 * tokens * m * n + 4 * m * n * r)
            own += 4 * times * tokens * m * n + 2 * m * n * r + times * gradients
    return full / own


@dataclass(frozen=True)
class Timed:
    """One step in ms."""

    passes: float
    update: float

    @property
    def whole(self) -> float:
        return self.passes + self.update


class Clock:
    """Moments of a device: of the processor on a host, events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Milliseconds; waits for the device."""
        if self.device.type != "cuda":
            return 1e3 * (last - first)
        last.synchronize()
        return first.elapsed_time(last)


def _device() -> torch.device:
    from relora_ds.engine.deepspeed.process_group import accelerator_type

    return torch.device(accelerator_type())


def _architecture(parsed: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        vocab_size=parsed.vocab,
        hidden_size=parsed.hidden,
        intermediate_size=parsed.ffn,
        num_hidden_layers=parsed.layers,
        num_attention_heads=parsed.heads,
        num_key_value_heads=parsed.heads,
        head_dim=parsed.hidden // parsed.heads,
        max_position_embeddings=parsed.seq,
    )


def _stepper(case: StepCase, parsed: argparse.Namespace, clock: Clock) -> Callable[[int], Timed]:
    draw = torch.Generator().manual_seed(1)
    shape = (parsed.accumulation, parsed.batch, parsed.seq + 1)
    tokens = torch.randint(0, parsed.vocab, shape, generator=draw).to(clock.device)
    if case.method == "transformers":
        return _transformers(parsed, tokens, clock)
    return _ours(case, parsed, tokens, clock)


def _settings(case: StepCase) -> dict[str, object]:
    if case.method in _MATRIX_OPTIMIZERS:
        return {"name": "full"}
    never = 10**6
    more: dict[str, dict[str, object]] = {
        "relora": {"merge_every": never, "restart_warmup_steps": 1},
        # the event has a benchmark of its own: benchmarks/switch.py
        "switchlora": {"interval": never},
        "low_rank": {"init": "xavier"},
        # a refresh in the first step, which is not timed
        "galore": {"update_every": never},
    }
    rank = {} if case.rank is None else {"rank": case.rank}
    return {"name": case.method, **rank, **more.get(case.method, {})}


def _optimizer(case: StepCase, parsed: argparse.Namespace) -> dict[str, object]:
    if case.method in _MATRIX_OPTIMIZERS:
        return {"matrix": case.method}
    has_pairs = case.rank is not None and case.method != "galore"
    return {"adapter": parsed.adapter} if has_pairs and parsed.adapter else {}


def _ours(
    case: StepCase, parsed: argparse.Namespace, tokens: torch.Tensor, clock: Clock
) -> Callable[[int], Timed]:
    from relora_ds.engine import distributed
    from relora_ds.engine.assemble import build_engine
    from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
    from relora_ds.methods.registry import plan_phases
    from relora_ds.model.llama import Llama

    config = RunConfig.model_validate_json(json.dumps(_description(case, parsed)))
    topology = distributed.start(_TIMEOUT_MINUTES)
    source = {"zero_optimization": {"stage": parsed.stage}}
    zero = resolve_deepspeed_config(source, config, topology.dp_size)
    method = plan_phases(config)[-1].method
    engine = build_engine(_architecture(parsed), method, config, zero, topology)
    if parsed.compile and isinstance(engine.model, Llama):
        engine.model.compile_layers()
    engine.set_learning_rates(dict.fromkeys(("dense", "adapter", "pair"), 1e-3))
    with torch.no_grad():
        session = method.start(engine.state, engine.model)
    engine.state.gradients.batch = lambda: tokens.unbind(0)
    began: list[Any] = []
    engine.optimizer.register_step_pre_hook(lambda *_: began.append(clock.now()))

    def step(number: int) -> Timed:
        began.clear()
        with torch.no_grad():
            session.before_step(number)
        first = clock.now()
        engine.train_step(tokens.unbind(0))
        last = clock.now()
        with torch.no_grad():
            session.after_step(number + 1)
        return Timed(clock.between(first, began[0]), clock.between(began[0], last))

    return step


def _description(case: StepCase, parsed: argparse.Namespace) -> dict[str, object]:
    return {
        "output_dir": "unused",
        "model": "unused",
        "deepspeed": "unused",
        "method": _settings(case),
        "optimizer": _optimizer(case, parsed),
        "train": {
            "steps": 1000,
            "seq_length": parsed.seq,
            "micro_batch_size": parsed.batch,
            "global_batch_size": parsed.batch * parsed.accumulation,
            "precision": parsed.precision,
            "activation_checkpointing": parsed.checkpointing,
            "formulation": case.formulation if case.formulation in _FORMULATIONS else "auto",
            "pad_mlp": case.pad_mlp,
        },
    }


def _transformers(
    parsed: argparse.Namespace, tokens: torch.Tensor, clock: Clock
) -> Callable[[int], Timed]:
    """`LlamaForCausalLM` of the same shape with torch's fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_architecture(parsed).model_dump(), use_cache=False)
    model = cast(nn.Module, LlamaForCausalLM(config))
    model.to(device=clock.device, dtype=DTYPES[parsed.precision]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(number: int) -> Timed:
        first = clock.now()
        for batch in tokens.unbind(0):
            ids = batch[:, :-1]
            (model(input_ids=ids, labels=ids).loss / len(tokens)).backward()
        began = clock.now()
        optimizer.step()
        optimizer.zero_grad()
        last = clock.now()
        return Timed(clock.between(first, began), clock.between(began, last))

    return step


def _figures(
    case: StepCase, timed: dict[StepCase, list[Timed]], parsed: argparse.Namespace
) -> Figures:
    def ratio(method: str) -> float | None:
        other = next((found for each, found in timed.items() if each.method == method), None)
        if other is None:
            return None
        # pairs of one turn: what slows the machine down slows both
        pairs = zip(other, timed[case], strict=True)
        return statistics.median(theirs.whole / own.whole for theirs, own in pairs)

    whole = statistics.median(each.whole for each in timed[case])
    tokens = parsed.batch * parsed.seq * parsed.accumulation
    device = _device()
    return Figures(
        **asdict(case),
        step_ms=whole,
        forward_backward_ms=statistics.median(each.passes for each in timed[case]),
        optimizer_ms=statistics.median(each.update for each in timed[case]),
        tokens_per_second=1e3 * tokens / whole,
        ratio_to_full=ratio("full"),
        bound_to_full=bound(case, parsed),
        ratio_to_transformers=ratio("transformers"),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def table(figures: list[Figures]) -> list[str]:
    """The figures as a Markdown table."""

    def cell(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if isinstance(value, float) and value < 10 else _plain(value)

    def _plain(value: object) -> str:
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    names = [name for name in Figures.__annotations__ if name != "peak_bytes"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for each in figures:
        lines.append("| " + " | ".join(cell(getattr(each, name)) for name in names) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(run_tool(main))
