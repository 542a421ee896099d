"""What the planner says of islands."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from relora_ds.cli.numbers import amount
from relora_ds.cli.plan import main
from relora_ds.config.load import load_run_config
from relora_ds.errors import ConfigError
from relora_ds.planning.islands import plan_islands
from relora_ds.planning.results import Cluster, IslandLink, IslandsPlan

ROOT = Path(__file__).resolve().parents[3]
RUN = ROOT / "configs" / "run" / "llama_1b_relora.yaml"
SMALL = ROOT / "configs" / "run" / "quickstart.yaml"
SLOW = IslandLink(bandwidth=12.5e6, latency=0.02)


@cache
def planned(*overrides: str, gpus: int = 16) -> IslandsPlan:
    """The ReLoRA phase of the 1.3B run in rounds of a hundred updates."""
    every = ["parallel.islands=2", "islands.every=100", *overrides]
    loaded = load_run_config(RUN, every)
    return plan_islands(loaded, Cluster(gpus), SLOW)[1]["relora"]


def test_a_hundred_updates_in_four_bits_are_a_thousand_times_less() -> None:
    found = planned("islands.transport.bits=4", "method.rank=128")
    assert found.asked.every == 100
    assert found.asked.less >= 1000
    assert planned("method.rank=128").asked.less < 300


def test_what_a_method_exchanges_besides_is_its_own() -> None:
    def small(method: str) -> IslandsPlan:
        rounds = ["parallel.islands=2", "islands.every=25", "train.global_batch_size=16"]
        loaded = load_run_config(SMALL, [f"method={method}", *rounds])
        (found,) = plan_islands(loaded, Cluster(2), SLOW)[1].values()
        return found

    rare, often = (
        small(f"{{name: galore, rank: 8, update_every: {every}}}") for every in (200, 100)
    )
    assert rare.merge_bytes == 0.0
    # gradients in fp32 of the projections alone, in place of the whole model in bf16
    assert rare.dense_bytes < rare.refresh_bytes == often.refresh_bytes < 2 * rare.dense_bytes
    more = often.asked.bytes_per_update - rare.asked.bytes_per_update
    assert more == pytest.approx(often.refresh_bytes / 200)
    assert often.asked.speed < rare.asked.speed
    switching = small("{name: switchlora, rank: 8, interval: 100}")
    assert (switching.merge_bytes, switching.refresh_bytes) == (0.0, 0.0)


def test_longer_rounds_send_less_and_keep_more_of_the_speed() -> None:
    found = planned("islands.transport.bits=4")
    sent = [each.bytes_per_update for each in found.rounds]
    speed = [each.speed for each in found.rounds]
    assert sent == sorted(sent, reverse=True)
    assert speed == sorted(speed)
    good = [each.every for each in found.rounds if each.speed >= 0.9]
    assert found.best == good[0]
    assert found.dense_seconds > 100 * found.local_seconds


def test_fragments_that_travel_while_islands_train_hide_the_link() -> None:
    wide = "islands.transport.bits=4"
    turns = "islands.transport.fragments=4", "islands.transport.overlap=20"
    blocked, hidden = planned(wide), planned(wide, *turns)
    assert hidden.fragment_bytes < hidden.round_bytes / 2
    assert hidden.round_bytes == blocked.round_bytes
    assert blocked.asked.speed < hidden.asked.speed <= 1
    # common weights, for evaluations, checkpoints and merges, cost their exchange as before
    asked = hidden.asked
    assert asked.bytes_per_update == pytest.approx(blocked.asked.bytes_per_update, rel=0.25)
    shortest = hidden.rounds[0]
    assert shortest.every == 1
    assert shortest.seconds_per_update >= shortest.bytes_per_update / SLOW.bandwidth


def test_short_rounds_and_shared_gradients_of_early_updates_are_counted() -> None:
    loaded = load_run_config(RUN, [])
    warm = loaded.config.method.warm_start
    assert warm is not None
    start, added = warm.steps, 500
    phase = loaded.config.train.steps - start
    plain = planned()
    ramp = planned(f"islands.ramp=[[{start + added}, 10]]").asked
    more = plain.round_bytes * (added / 10 - added / 100) / phase
    assert ramp.bytes_per_update == pytest.approx(plain.asked.bytes_per_update + more)
    assert plain.asked.speed > ramp.speed

    together = planned(f"islands.from_step={start + added}").asked
    gradients = planned("islands.every=1").asked.bytes_per_update
    share = added / phase
    expected = share * gradients + (1 - share) * plain.asked.bytes_per_update
    assert together.bytes_per_update == pytest.approx(expected)
    assert ramp.speed > together.speed


def test_what_an_island_sends_does_not_depend_on_how_many_share_it() -> None:
    few, many = planned(gpus=4), planned(gpus=32)
    assert few.round_bytes == pytest.approx(many.round_bytes, rel=1e-4)
    assert few.merge_bytes == pytest.approx(many.merge_bytes, rel=1e-4)


def test_processes_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gpus 3 must be a multiple of parallel.islands \(2\)"):
        planned(gpus=3)


def test_the_tool_takes_bits_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    assert amount("100Mbit") == amount("12.5MB/s") == 12.5e6
    command = [str(RUN), "--gpus", "16", "--islands", "2", "--island-bandwidth", "1Gbit", "--json"]
    assert main([*command, "islands.every=50"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["islands"]["relora"]["asked"]["every"] == 50
    assert said["cluster"]["gpus"] == 8
