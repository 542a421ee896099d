"""A court's file: who is compared, on which run, with which seeds and rates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from relora_ds.config.base import FilePath, NonNegativeInt, PositiveFloat, PositiveInt, Section
from relora_ds.config.explain import explain
from relora_ds.config.load import LoadedRun, load_run_config
from relora_ds.config.reading.source import read_yaml
from relora_ds.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=60)]


class ContestantConfig(Section):
    """One way to train."""

    name: Name
    """Names it in records, directories and on the command line."""
    title: str
    """How tables name it."""
    overrides: tuple[str, ...] = ()
    """Keys of the run that make it what it is, as `key=value`."""
    rates: tuple[PositiveFloat, ...]
    """Learning rates tried on the tuning seed, ascending; none are tried where there is one."""
    rate_key: str = "optimizer.adapter_lr"
    """Key of the run that is tuned."""
    tuned_as: Name | None = None
    """Another contestant whose best rate is taken, instead of `rates`, which is then empty."""
    published: str = ""
    """What its authors report, for the table."""
    by_name: bool = False
    """Take part only where it is named on the command line."""

    @model_validator(mode="after")
    def _rates_are_for_tuning(self) -> ContestantConfig:
        if bool(self.rates) is (self.tuned_as is not None):
            raise ValueError("give either rates, or tuned_as and an empty list of rates")
        if list(self.rates) != sorted(set(self.rates)):
            raise ValueError("rates must ascend")
        return self


class CourtConfig(Section):
    """A comparison of contestants on one order of the data."""

    output_dir: FilePath
    """Where records, runs and tables go."""
    run: FilePath
    """Run file that everybody starts from."""
    overrides: tuple[str, ...] = ()
    """Keys of the run that are the same for everybody, as `key=value`."""
    tuning_seed: NonNegativeInt = 1
    """Seed on which rates are tried; not among `seeds`."""
    seeds: tuple[NonNegativeInt, ...] = (2, 3, 4)
    """Seeds of the runs that are reported, each with the best rate."""
    most_rates: PositiveInt = 5
    """A best rate at an edge is passed by one more, up to so many."""
    processes: PositiveInt = 1
    """Data-parallel processes of each run."""
    wire_processes: PositiveInt = 2
    """Data-parallel processes for which bytes on the wire are stated, in closed form."""
    keep_checkpoints: bool = True
    """Whether a recorded run keeps its checkpoints; its export, metrics and summary stay."""
    references: tuple[Name, ...]
    """Contestants that all others are compared with, seed by seed."""
    contestants: tuple[ContestantConfig, ...]
    """In the order in which they run."""

    @model_validator(mode="after")
    def _names_are_known(self) -> CourtConfig:
        names = [contestant.name for contestant in self.contestants]
        tuned = {contestant.name for contestant in self.contestants if contestant.rates}
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two contestants are named {sorted(doubled)[0]}")
        for reference in self.references:
            if reference not in names:
                raise ValueError(f"reference {reference} is no contestant")
        for contestant in self.contestants:
            if contestant.tuned_as is not None and contestant.tuned_as not in tuned:
                raise ValueError(f"{contestant.tuned_as} is no contestant with rates of its own")
        if doubled := {seed for seed in self.seeds if self.seeds.count(seed) > 1}:
            raise ValueError(f"seed {min(doubled)} is given twice, and would count twice")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"seed {self.tuning_seed} tunes: it may not be reported too")
        return self


@dataclass(frozen=True)
class Court:
    """A court whose every contestant passed the checks of a run."""

    config: CourtConfig
    contestants: tuple[ContestantConfig, ...]
    """Those that were asked for."""
    settings: dict[str, str]
    """By contestant: what tells its runs from those of another description, but for rate and
    seed."""
    overrides: tuple[str, ...]
    """From the command line, for everybody."""

    @property
    def directory(self) -> Path:
        """Where records, runs and tables go."""
        return Path(self.config.output_dir)

    def contestant(self, name: str) -> ContestantConfig:
        """A contestant of the file, asked for or not."""
        return next(each for each in self.config.contestants if each.name == name)

    def arguments(self, name: str) -> list[str]:
        """Run file and overrides of a contestant, without its rate, seed and place."""
        return [self.config.run, *_overrides(self.config, self.contestant(name), self.overrides)]

    def loaded(self, name: str, *more: str) -> LoadedRun:
        """The checked run of a contestant."""
        run, *overrides = self.arguments(name)
        return load_run_config(run, [*overrides, *more])


def load_court(
    path: str | Path,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    changes: dict[str, Any] | None = None,
) -> Court:
    """Read a court's file and check it, and the run of every contestant.

    Args:
        overrides: `key=value` of the run, for everybody.
        only: names of contestants; if empty, all that need not be named.
        changes: keys of the court that replace the file's.

    Raises:
        ConfigError: the file, an override or a contestant's run is wrong.
    """
    document = read_yaml(path)
    document.data |= changes or {}
    try:
        config = CourtConfig.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        findings = explain(error, document.data, CourtConfig)
        raise ConfigError([*document.problems, *document.report(findings)]) from None
    if document.problems:
        raise ConfigError(document.problems)
    names = [contestant.name for contestant in config.contestants]
    if unknown := [name for name in only if name not in names]:
        raise ConfigError(f"{unknown[0]} is no contestant of {path}: choose of {', '.join(names)}")
    taken = tuple(c for c in config.contestants if (c.name in only if only else not c.by_name))
    settings = {each.name: _setting(config, each, overrides) for each in config.contestants}
    court = Court(config, taken, settings, tuple(overrides))
    problems: list[str] = []
    for contestant in taken:
        try:
            court.loaded(contestant.name)
        except ConfigError as error:
            problems += [f"{contestant.name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return court


def _overrides(
    config: CourtConfig, contestant: ContestantConfig, given: Sequence[str]
) -> list[str]:
    return [*config.overrides, *contestant.overrides, *given]


def _setting(config: CourtConfig, contestant: ContestantConfig, given: Sequence[str]) -> str:
    """A hash of what was written, which new keys with defaults do not change."""
    run = read_yaml(config.run).data
    run.pop("output_dir", None)
    overrides = _overrides(config, contestant, given)
    text = json.dumps([run, overrides, contestant.rate_key, config.processes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
