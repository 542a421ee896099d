"""What a court found so far: one standing per contestant, as a table and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.trials.costs import Costs
from benchmarks.trials.description import ContestantConfig, Court
from benchmarks.trials.ledger import Ledger, Record, Trial
from benchmarks.trials.rule import best_rate, tried_rates


@dataclass(frozen=True)
class Standing:
    """What is known of one contestant.

    Args:
        name: of the contestant.
        title: for tables.
        tried: perplexity on the tuning seed by rate; infinite where the run diverged.
        rate: of the reported runs; None while it is not decided.
        by_seed: perplexity of the reported runs.
        mean: of those.
        deviation: standard deviation between them; None of fewer than two.
        over: by reference, the mean over common seeds of this perplexity over the reference's.
        cpu_seconds: mean of a reported run; None where it is not known of any.
        effective_rank: mean of the reported runs.
        costs: in closed form.
        published: what the authors report.
    """

    name: str
    title: str
    tried: dict[float, float]
    rate: float | None
    by_seed: dict[int, float]
    mean: float | None
    deviation: float | None
    over: dict[str, float]
    cpu_seconds: float | None
    effective_rank: float | None
    costs: Costs
    published: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values; what diverged is null."""
        found = asdict(self)
        found["tried"] = {f"{r:g}": _finite(p) for r, p in self.tried.items()}
        found["by_seed"] = {str(seed): _finite(p) for seed, p in self.by_seed.items()}
        found["mean"] = None if self.mean is None else _finite(self.mean)
        found["over"] = {name: _finite(value) for name, value in self.over.items()}
        return found


def reported(court: Court, contestant: ContestantConfig, ledger: Ledger) -> dict[int, Record]:
    """Finished runs of a contestant at its best rate, by reported seed."""
    rate = best_rate(court.config, contestant, ledger)
    if rate is None:
        return {}
    trials = [Trial(contestant.name, rate, seed) for seed in court.config.seeds]
    return {trial.seed: ledger.records[trial] for trial in trials if trial in ledger.records}


def standings(court: Court, ledger: Ledger, costs: Mapping[str, Costs]) -> list[Standing]:
    """Of every contestant that was asked for, in order."""
    references = {
        name: _perplexities(reported(court, court.contestant(name), ledger))
        for name in court.config.references
    }
    found = []
    for contestant in court.contestants:
        records = reported(court, contestant, ledger)
        by_seed = _perplexities(records)
        tried = {} if contestant.tuned_as else tried_rates(court.config, contestant, ledger)
        values = list(by_seed.values())
        found.append(
            Standing(
                name=contestant.name,
                title=contestant.title,
                tried={rate: value for rate, value in tried.items() if value is not None},
                rate=best_rate(court.config, contestant, ledger),
                by_seed=by_seed,
                mean=_mean(values),
                deviation=_deviation(values),
                over=_over(by_seed, references),
                cpu_seconds=_mean([r.cpu_seconds for r in records.values()]),
                effective_rank=_mean([r.effective_rank for r in records.values()]),
                costs=costs[contestant.name],
                published=contestant.published,
            )
        )
    return found


def markdown(court: Court, found: Sequence[Standing]) -> str:
    """The table, with what it takes to read it."""
    seeds = ", ".join(str(seed) for seed in court.config.seeds)
    references = court.config.references
    heads = [
        "",
        f"rates on seed {court.config.tuning_seed}",
        f"seeds {seeds}",
        "mean, deviation",
        *(f"over {court.contestant(name).title}" for name in references),
        "trained",
        "states, MB",
        "MFLOP per token",
        f"MB sent, {court.config.wire_processes} processes",
        "processor s",
        "effective rank",
        "published",
    ]
    rows = [heads, ["---"] * len(heads), *(_row(each, references) for each in found)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(each: Standing, references: Sequence[str]) -> list[str]:
    tried = [
        f"**{rate:g}: {_text(value)}**" if rate == each.rate else f"{rate:g}: {_text(value)}"
        for rate, value in each.tried.items()
    ]
    at = f"{each.rate:g}" if not each.tried and each.rate is not None else ""
    deviation = "" if each.deviation is None else f" ± {each.deviation:.2f}"
    over = [each.over.get(name) for name in references]
    return [
        each.title,
        ", ".join(tried) or at,
        ", ".join(_text(value) for value in each.by_seed.values()),
        "" if each.mean is None else f"{_text(each.mean)}{deviation}",
        *("" if value is None else f"{value:.3f}" for value in over),
        f"{each.costs.trained:,}",
        f"{each.costs.states_bytes / 1e6:.1f}",
        f"{each.costs.flops_per_token / 1e6:.2f}",
        f"{each.costs.wire_bytes / 1e6:.2f}",
        "" if each.cpu_seconds is None else f"{each.cpu_seconds:.0f}",
        "" if each.effective_rank is None else f"{each.effective_rank:.2f}",
        each.published,
    ]


def _perplexities(records: Mapping[int, Record]) -> dict[int, float]:
    return {
        seed: math.inf if record.perplexity is None else record.perplexity
        for seed, record in records.items()
    }


def _over(
    by_seed: Mapping[int, float], references: Mapping[str, Mapping[int, float]]
) -> dict[str, float]:
    found = {}
    for name, other in references.items():
        ratios = [value / other[seed] for seed, value in by_seed.items() if seed in other]
        if ratios:
            found[name] = statistics.fmean(ratios)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(perplexity: float) -> str:
    return f"{perplexity:.2f}" if math.isfinite(perplexity) else "diverged"
