"""The rule that tunes every contestant alike: rates on one seed, then the best on fresh seeds.

A best rate at an edge of those tried is passed by one more, at the same ratio, until there are
`most_rates`. A run that diverged counts as infinitely bad. Nothing is tuned on reported seeds.
"""

from __future__ import annotations

from benchmarks.trials.description import ContestantConfig, CourtConfig
from benchmarks.trials.ledger import Ledger, Trial


def tried_rates(
    court: CourtConfig, contestant: ContestantConfig, ledger: Ledger
) -> dict[float, float | None]:
    """Perplexity on the tuning seed by rate, None where the run is to do, in ascending order."""
    rates = list(contestant.rates)
    if len(rates) == 1:
        return {}

    def found() -> dict[float, float | None]:
        seed = court.tuning_seed
        return {r: ledger.perplexity(Trial(contestant.name, r, seed)) for r in sorted(rates)}

    while None not in found().values() and len(rates) < court.most_rates:
        best = _lowest(found())
        if best == max(rates):
            rates.append(_rounded(best * contestant.rates[-1] / contestant.rates[-2]))
        elif best == min(rates):
            rates.append(_rounded(best * contestant.rates[0] / contestant.rates[1]))
        else:
            break
    return found()


def best_rate(court: CourtConfig, contestant: ContestantConfig, ledger: Ledger) -> float | None:
    """The rate of the reported runs; None while a run that decides it is to do."""
    if contestant.tuned_as is not None:
        return best_rate(court, _named(court, contestant.tuned_as), ledger)
    if len(contestant.rates) == 1:
        return contestant.rates[0]
    tried = tried_rates(court, contestant, ledger)
    return None if None in tried.values() else _lowest(tried)


def to_do(court: CourtConfig, contestant: ContestantConfig, ledger: Ledger) -> list[Trial]:
    """Runs that are not finished and can be started now, in order.

    Those that tune the contestant whose rate this one takes come first.
    """
    if contestant.tuned_as is not None and best_rate(court, contestant, ledger) is None:
        return to_do(court, _named(court, contestant.tuned_as), ledger)
    tried = {} if contestant.tuned_as else tried_rates(court, contestant, ledger)
    if open_rates := [rate for rate, found in tried.items() if found is None]:
        wanted = [Trial(contestant.name, rate, court.tuning_seed) for rate in open_rates]
        return sorted(wanted, key=lambda trial: _given_first(contestant, trial.rate))
    rate = best_rate(court, contestant, ledger)
    if rate is None:
        return []
    reported = [Trial(contestant.name, rate, seed) for seed in court.seeds]
    return [trial for trial in reported if ledger.perplexity(trial) is None]


def _named(court: CourtConfig, name: str) -> ContestantConfig:
    return next(each for each in court.contestants if each.name == name)


def _lowest(tried: dict[float, float | None]) -> float:
    return min(tried, key=lambda rate: (tried[rate], rate))  # pyright: ignore[reportArgumentType]


def _given_first(contestant: ContestantConfig, rate: float) -> int:
    """Rates of the file in its order, those beyond its edges last."""
    rates = list(contestant.rates)
    return rates.index(rate) if rate in rates else len(rates)


def _rounded(rate: float) -> float:
    """Three digits: the name of a run's directory, and what its command says."""
    return float(f"{rate:.3g}")
