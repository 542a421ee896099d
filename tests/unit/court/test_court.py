"""Courts: the rule that tunes, records that survive, runs that are interrupted, and the table."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trials.costs import costs_of
from benchmarks.trials.description import Court, load_court
from benchmarks.trials.ledger import Ledger, Record, Trial, held
from benchmarks.trials.rule import best_rate, to_do, tried_rates
from benchmarks.trials.running import Runner, run_directory, training_command
from benchmarks.trials.verdict import markdown, standings
from relora_ds.errors import ConfigError

ROOT = Path(__file__).parents[3]
COURTS = sorted((ROOT / "configs/court").glob("*.yaml"))
CONTESTANTS: list[dict[str, Any]] = [
    {
        "name": "full",
        "title": "full",
        "overrides": ["method={name: full}"],
        "rates": [0.001, 0.002, 0.004],
    },
    {"name": "relora", "title": "relora", "rates": [0.005]},
    {
        "name": "wide",
        "title": "full at another rank",
        "overrides": ["method={name: full}"],
        "rates": [],
        "tuned_as": "full",
    },
]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def described(tmp_path: Path, **changes: Any) -> Court:
    file = tmp_path / "court.yaml"
    content = {
        "output_dir": str(tmp_path / "court"),
        "run": "configs/run/quickstart.yaml",
        "seeds": [2, 3],
        "references": ["full"],
        "contestants": CONTESTANTS,
    }
    file.write_text(json.dumps(content | changes))
    return load_court(file)


def ledger_of(court: Court, found: Mapping[tuple[str, float, int], float | None]) -> Ledger:
    ledger = Ledger(court.directory / "records.jsonl", court.settings)
    for (name, rate, seed), perplexity in found.items():
        ledger.add(Record(name, rate, seed, court.settings[name], perplexity, cpu_seconds=10.0))
    return ledger


@pytest.mark.parametrize("path", COURTS, ids=lambda path: path.stem)
def test_every_shipped_court_is_valid(path: Path) -> None:
    court = load_court(path)
    assert set(court.config.references) <= {each.name for each in court.contestants}
    assert any("matrix=muon" in " ".join(each.overrides) for each in court.contestants)
    for contestant in court.config.contestants:
        court.loaded(contestant.name)


def test_rates_are_tried_on_one_seed_and_the_best_one_runs_on_the_others(tmp_path: Path) -> None:
    court = described(tmp_path)
    full = court.contestant("full")
    ledger = ledger_of(court, {})
    assert to_do(court.config, full, ledger) == [Trial("full", r, 1) for r in full.rates]
    ledger = ledger_of(
        court, {("full", 0.001, 1): 44.0, ("full", 0.002, 1): 42.0, ("full", 0.004, 1): None}
    )
    assert best_rate(court.config, full, ledger) == 0.002
    assert to_do(court.config, full, ledger) == [Trial("full", 0.002, s) for s in (2, 3)]
    # of one rate nothing is tuned, and another one's rate is taken over
    relora, wide = court.contestant("relora"), court.contestant("wide")
    assert to_do(court.config, relora, ledger) == [Trial("relora", 0.005, s) for s in (2, 3)]
    assert to_do(court.config, wide, ledger) == [Trial("wide", 0.002, s) for s in (2, 3)]


def test_a_best_rate_at_an_edge_is_passed(tmp_path: Path) -> None:
    court = described(tmp_path, most_rates=5)
    full = court.contestant("full")
    falling = {("full", r, 1): 50 - 1000 * r for r in (0.001, 0.002, 0.004)}
    ledger = ledger_of(court, falling)
    assert to_do(court.config, full, ledger) == [Trial("full", 0.008, 1)]
    ledger = ledger_of(court, {("full", 0.008, 1): 40.0})
    assert to_do(court.config, full, ledger) == [Trial("full", 0.016, 1)]
    ledger = ledger_of(court, {("full", 0.016, 1): 39.0})
    assert best_rate(court.config, full, ledger) == 0.016  # five are enough
    assert list(tried_rates(court.config, full, ledger)) == [0.001, 0.002, 0.004, 0.008, 0.016]
    rising = {("full", r, 1): 50 + 1000 * r for r in (0.001, 0.002, 0.004)}
    (other := tmp_path / "other").mkdir()
    court = described(other)
    assert to_do(court.config, full, ledger_of(court, rising)) == [Trial("full", 0.0005, 1)]


def test_records_survive_a_torn_line_and_belong_to_their_description(tmp_path: Path) -> None:
    court = described(tmp_path)
    ledger_of(court, {("full", 0.001, 1): 44.0})
    path = court.directory / "records.jsonl"
    path.write_bytes(path.read_bytes() + b'{"contestant": "full", "ra')
    ledger_of(court, {("full", 0.002, 1): 42.0})
    again = ledger_of(court, {})
    assert [again.perplexity(Trial("full", r, 1)) for r in (0.001, 0.002, 0.004)] == [44, 42, None]
    longer = load_court(tmp_path / "court.yaml", ["train.steps=1000"])
    assert not Ledger(path, longer.settings).records
    # comments and new places change nothing
    moved = load_court(tmp_path / "court.yaml", changes={"output_dir": str(tmp_path / "moved")})
    assert moved.settings == court.settings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"references": ["nobody"]}, "nobody"),
        ({"tuning_seed": 3}, "seed 3"),
        ({"seeds": [2, 3, 2]}, "seed 2 is given twice"),
        ({"contestants": [*CONTESTANTS, CONTESTANTS[0]]}, "two contestants are named full"),
        ({"contestants": [{**CONTESTANTS[0], "rates": [2e-3, 1e-3]}]}, "ascend"),
        ({"contestants": [{**CONTESTANTS[0], "rates": []}]}, "tuned_as"),
        ({"contestants": [{**CONTESTANTS[0], "overrides": ["method.rnk=3"]}]}, "full: "),
        ({"sedes": [2]}, "seeds"),
    ],
)
def test_a_wrong_court_is_told_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        described(tmp_path, **changes)


def test_one_court_at_a_time(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(ConfigError, match="another court"), held(tmp_path):
        pass


_TRAINER = """
import json, pathlib, signal, sys, time
place, rate, seed = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
place.mkdir(parents=True, exist_ok=True)
if not (place / "saved").exists() and sys.argv[4] == "slow":
    signal.signal(signal.SIGTERM, lambda *_: ((place / "saved").touch(), sys.exit(75)))
    (place / "started").touch()
    time.sleep(60)
if rate == 0.004:
    (place / "summary.json").write_text(json.dumps({"final": {}}))
    (place / "metrics.jsonl").touch()
    sys.exit(5)
if sys.argv[4] == "broken":
    sys.exit(2)
perplexity = 40 + seed + 1000 * abs(rate - 0.002)
final = {"final": {"eval/perplexity": perplexity}}
(place / "summary.json").write_text(json.dumps(final))
(place / "checkpoints").mkdir(exist_ok=True)
lines = [{"step": 1, "eval/perplexity": 99.0}, {"step": 2, "eval/perplexity": perplexity}]
(place / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
"""


class Trainer:
    """Stands in for the program that trains: one second instead of three minutes."""

    def __init__(self, kind: str = "quick") -> None:
        self.kind = kind

    def __call__(self, court: Court, trial: Trial) -> list[str]:
        place = str(run_directory(court, trial))
        return [sys.executable, "-c", _TRAINER, place, str(trial.rate), str(trial.seed), self.kind]


class Watcher:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Trial, str]] = []
        self.at_once = self.most = 0

    def started(self, trial: Trial) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)

    def ended(self, trial: Trial, outcome: str) -> None:
        self.at_once -= 1
        self.told.append((trial, outcome))

    def tick(self) -> None:
        pass


class Interrupting(Watcher):
    """Sends Ctrl-C to this process as soon as a run has begun."""

    def __init__(self, started: Path) -> None:
        super().__init__()
        self._started = started

    def tick(self) -> None:
        if self._started.exists():
            signal.raise_signal(signal.SIGINT)


def test_a_court_runs_what_its_rule_wants_and_never_again(tmp_path: Path) -> None:
    court, watcher = described(tmp_path), Watcher()
    ledger = ledger_of(court, {})
    assert Runner(court, ledger, 3, watcher, Trainer()).hold()
    assert len(watcher.told) == len(ledger.records) == 3 + 2 + 2 + 2
    assert watcher.most == 3
    assert ledger.records[Trial("full", 0.004, 1)].perplexity is None
    record = ledger_of(court, {}).records[Trial("full", 0.002, 3)]  # as it is on disk
    assert record.perplexity == 43
    assert [tuple(point) for point in record.curve] == [(1, 99.0), (2, 43.0)]
    assert record.cpu_seconds is not None
    assert 0 < record.cpu_seconds < 10
    again = Watcher()
    assert Runner(court, ledger_of(court, {}), 3, again, Trainer()).hold()
    assert not again.told


@pytest.fixture
def unheard() -> Iterator[None]:
    """Signals reach their handlers alone: a training run that another test started in this process
    would hear them too, and end it."""
    before = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(before)


@pytest.mark.parametrize("how", ["time", "signal"])
def test_interrupted_runs_save_and_go_on(tmp_path: Path, unheard: None, how: str) -> None:
    court = described(tmp_path, seeds=[2])
    started = run_directory(court, Trial("full", 0.001, 1)) / "started"
    watcher = Interrupting(started) if how == "signal" else Watcher()
    ledger = ledger_of(court, {})
    runner = Runner(court, ledger, 1, watcher, Trainer("slow"))
    assert not runner.hold(2.0 if how == "time" else None)
    assert watcher.told == [(Trial("full", 0.001, 1), "interrupted")]
    assert not ledger.records
    assert Runner(court, ledger, 1, Watcher(), Trainer()).hold()
    assert len(ledger.records) == 3 + 1 + 1 + 1
    first = ledger.records[Trial("full", 0.001, 1)]
    assert first.wall_seconds is not None
    assert first.wall_seconds > 0.5  # of both parts


def test_the_time_of_a_run_that_was_removed_is_not_counted(tmp_path: Path) -> None:
    court = described(tmp_path, seeds=[2], contestants=CONTESTANTS[:1], references=["full"])
    logs = court.directory / "logs"
    logs.mkdir(parents=True)
    spent = '{}\n{"cpu_seconds": 500.0, "wall_seconds": 500.0}\n'
    (logs / "full_rate_0.001_seed_1.spent").write_text(spent)
    ledger = ledger_of(court, {})
    assert Runner(court, ledger, 2, Watcher(), Trainer()).hold()
    seconds = ledger.records[Trial("full", 0.001, 1)].wall_seconds
    assert seconds is not None
    assert seconds < 500


@pytest.mark.parametrize("kept", [True, False])
def test_checkpoints_of_finished_runs_stay_or_go(tmp_path: Path, kept: bool) -> None:
    court = described(tmp_path, seeds=[2], contestants=CONTESTANTS[:2], keep_checkpoints=kept)
    assert Runner(court, ledger_of(court, {}), 2, Watcher(), Trainer()).hold()
    place = run_directory(court, Trial("full", 0.002, 2))
    assert (place / "checkpoints").exists() is kept
    assert (place / "summary.json").exists()


def test_a_contestant_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    court, watcher = described(tmp_path), Watcher()
    ledger = ledger_of(court, {("full", r, 1): 44.0 for r in (0.001, 0.002)})
    runner = Runner(court, ledger, 1, watcher, Trainer("broken"))
    runner.hold()
    assert set(runner.failed) == {"full", "relora"}  # and wide waits for the rate of full
    assert "exit code 2" in runner.failed["relora"]
    assert list(ledger.records)[2:] == [Trial("full", 0.004, 1)]  # which diverged


def test_a_run_gets_its_own_rate_seed_and_place(tmp_path: Path) -> None:
    court = described(tmp_path, overrides=["train.steps=950"], processes=2)
    command = training_command(court, Trial("full", 0.002, 3))
    assert command[1:4] == ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    assert command[5:] == [
        "configs/run/quickstart.yaml",
        "train.steps=950",
        "method={name: full}",
        f"output_dir={court.directory}/full/rate_0.002_seed_3",
        "train.seed=3",
        "optimizer.adapter_lr=0.002",
    ]


def test_the_table_compares_seed_by_seed(tmp_path: Path) -> None:
    court = described(tmp_path)
    found = {("full", 0.001, 1): 44.0, ("full", 0.002, 1): 42.0, ("full", 0.004, 1): None}
    found |= {("full", 0.002, 2): 40.0, ("full", 0.002, 3): 50.0}
    found |= {("relora", 0.005, 3): 55.0}
    ledger = ledger_of(court, found)
    costs = {each.name: costs_of(court, each.name) for each in court.contestants}
    full, relora, wide = standings(court, ledger, costs)
    assert (full.mean, full.rate, full.over) == (45.0, 0.002, {"full": 1.0})
    assert full.deviation == pytest.approx(7.071, abs=1e-3)
    assert relora.over == {"full": pytest.approx(1.1)}  # with the seed that both have
    assert wide.mean is None
    assert full.as_dict()["tried"] == {"0.001": 44.0, "0.002": 42.0, "0.004": None}
    rows = markdown(court, [full, relora, wide]).splitlines()
    assert "0.001: 44.00, **0.002: 42.00**, 0.004: diverged" in rows[2]
    assert len({row.count("|") for row in rows}) == 1


def test_costs_are_those_of_the_whole_run(tmp_path: Path) -> None:
    court = described(tmp_path)
    full, relora = costs_of(court, "full"), costs_of(court, "relora")
    assert full.states_bytes == 12 * full.trained  # moments and masters in fp32
    # 240 of 900 updates are full-rank; two processes send all gradients once
    lone = load_court(tmp_path / "court.yaml", ["method.warm_start_steps=0"], only=["relora"])
    method = costs_of(lone, "relora")
    share = 240 / 900
    blend = share * full.flops_per_token + (1 - share) * method.flops_per_token
    assert relora.flops_per_token == pytest.approx(blend)
    assert relora.wire_bytes == pytest.approx(
        share * full.wire_bytes + (1 - share) * method.wire_bytes
    )
    assert relora.trained == method.trained
