"""What a run file may say of islands, and what it is told otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from relora_ds.config.checks import find_problems
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.config.spread.islands import IslandsConfig, OuterConfig
from relora_ds.parallel.topology import as_one_island

METHOD = {"name": "relora", "rank": 4, "merge_every": 20, "restart_warmup_steps": 2}


def problems(**sections: dict[str, Any]) -> dict[str, str]:
    """What is wrong with a run of two islands that meet every ten updates, by key."""
    method = sections.pop("method", {})
    described = {
        "output_dir": "unused",
        "model": "unused",
        "deepspeed": "unused",
        "data": {"source": "builtin"},
        "method": method if "name" in method else METHOD | method,
        "train": {"steps": 40, "seq_length": 8, "micro_batch_size": 1, "global_batch_size": 8}
        | sections.pop("train", {}),
        "eval": {"every": 20} | sections.pop("eval", {}),
        "checkpoint": {"every": 0} | sections.pop("checkpoint", {}),
        "parallel": {"islands": 2} | sections.pop("parallel", {}),
        "islands": {"every": 10} | sections.pop("islands", {}),
        **sections,
    }
    config = RunConfig.model_validate(described)
    found = find_problems({name: getattr(config, name) for name in RunConfig.model_fields})
    return {".".join(map(str, path)): message for path, message in found}


def test_rounds_that_end_with_every_common_step_are_accepted() -> None:
    assert problems() == {}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("train.steps", 45, "write 40 or 50"),
        ("method.merge_every", 15, "write 10 or 20"),
        ("method.warm_start_steps", 5, "write 10"),
        ("eval.every", 25, "write 20 or 30"),
        ("checkpoint.every", 12, "write 10 or 20"),
        ("train.global_batch_size", 9, "write 8 or 10"),
        ("train.per_layer_update", True, "write false"),
        ("guards.non_finite", "skip", "write stop"),
        ("guards.loss_spike", {"action": "warn"}, "write off"),
        ("parallel.islands", 1, "set parallel.islands"),
        ("islands.outer", {"nesterov": True}, "0.9 is usual"),
        ("islands.transport", {"fragments": 11}, "write 10 or less"),
        ("islands.transport", {"overlap": 10}, "write 9 or less"),
        ("islands.from_step", 15, "write 10 or 20"),
        ("islands.from_step", 40, "must be less than train.steps (40)"),
    ],
)
def test_what_does_not_fit_is_told_with_value_rule_and_remedy(
    key: str, value: object, told: str
) -> None:
    section, name = key.split(".")
    found = problems(**{section: {name: value}})
    about = "islands.every" if key == "parallel.islands" else key
    message = next(text for path, text in found.items() if path.startswith(about))
    assert message.startswith("is ")
    assert told in message


def test_a_basis_is_chosen_between_two_rounds() -> None:
    galore = {"name": "galore", "rank": 4}
    assert problems(method=galore) == {}
    found = problems(method=galore | {"update_every": 25})
    assert "write 20 or 30" in found["method.update_every"]


def test_updates_before_the_first_round_need_rounds() -> None:
    alone = problems(parallel={"islands": 1}, islands={"every": 1, "from_step": 10})
    assert "set parallel.islands" in alone["islands.from_step"]
    shared = problems(islands={"every": 1, "from_step": 10})
    assert "set islands.every" in shared["islands.from_step"]
    assert problems(islands={"from_step": 30}) == {}


def test_rates_have_a_factor_in_rounds_only() -> None:
    rounds = IslandsConfig(every=10, from_step=20, inner_lr=1.5)
    assert [rounds.rate_factor(done) for done in (0, 19, 20, 39)] == [1.0, 1.0, 1.5, 1.5]
    for none in (
        problems(parallel={"islands": 1}, islands={"every": 1, "inner_lr": 1.4}),
        problems(islands={"every": 1, "inner_lr": 1.4}),
    ):
        assert "there are none" in none["islands.inner_lr"]
    assert problems(islands={"inner_lr": 1.4}) == {}


def test_rounds_grow_from_a_ramp() -> None:
    rounds = IslandsConfig(every=10, from_step=10, ramp=((20, 4), (30, 5)))
    ends = [done for done in range(11, 51) if rounds.ends_at(done)]
    assert ends == [14, 18, 20, 25, 30, 40, 50]  # a multiple of ten ends a round in any case
    assert rounds.ramp_ends(0, 50, 10) == pytest.approx(len(ends) - 4)
    # two phases have the rounds of one, and rounds as short as the first stage add none
    assert rounds.ramp_ends(0, 20, 10) + rounds.ramp_ends(20, 50, 10) == pytest.approx(3)
    assert rounds.ramp_ends(0, 50, 4) == 0


def test_every_update_is_in_a_round_that_ends_once() -> None:
    rounds = IslandsConfig(every=10, from_step=10, ramp=((20, 4), (30, 5)))
    lengths = [rounds.round_ending(done) for done in range(1, 51)]
    assert lengths[:10] == [1] * 10  # gradients are shared
    assert {n: found for n, found in enumerate(lengths, 1) if n > 10 and found} == {
        14: 4, 18: 4, 20: 2, 25: 5, 30: 5, 40: 10, 50: 10
    }  # fmt: skip
    assert rounds.lengths() == [(10, 4), (20, 5), (30, 10)]
    assert IslandsConfig(every=1, outer=OuterConfig(lr=0.7)).round_ending(3) == 1


SMALL = ModelConfig(
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=16,
)


def problems_of_switches(steps: int, islands: dict[str, Any], **method: object) -> dict[str, str]:
    """What is wrong with two islands under SwitchLoRA of rank 32, which begins with 0.8 switches
    per update, by key."""
    settings = {"name": "switchlora", "rank": 32, "interval": 40, "freeze_steps": 5}
    train = {"steps": steps, "seq_length": 8, "micro_batch_size": 1, "global_batch_size": 8}
    config = RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": "unused",
            "deepspeed": "unused",
            "data": {"source": "builtin"},
            "method": settings | method,
            "train": train,
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
            "parallel": {"islands": 2},
            "islands": islands,
        }
    )
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}
    found = find_problems(sections | {"architecture": SMALL})
    return {".".join(map(str, path)): message for path, message in found}


def test_a_round_switches_no_more_vectors_than_are_free() -> None:
    # they hardly become rarer within a run
    assert problems_of_switches(4000, {"every": 20}) == {}
    told = problems_of_switches(4000, {"every": 40})
    assert list(told) == ["islands.every"]
    assert "is 40, so that 30 of 32 vectors" in told["islands.every"]
    assert "only 16 are free" in told["islands.every"]
    assert "method.interval to 76 or more" in told["islands.every"]
    assert problems_of_switches(4000, {"every": 40}, interval=76) == {}


def test_rounds_may_be_longer_where_switches_are_rare() -> None:
    late = {"every": 200, "from_step": 800}
    assert problems_of_switches(4000, late) == {}
    assert "islands.every" in problems_of_switches(4000, late, descent_rate=1.0)
    ramp = {"every": 200, "ramp": ((400, 20), (800, 40))}
    assert problems_of_switches(4000, ramp) == {}
    assert list(problems_of_switches(4000, ramp, interval=30)) == ["islands.ramp.0.1"]
    # a warm start has no switches, and rounds of its own
    warm = {"every": 200, "ramp": ((400, 40), (1200, 20))}
    assert list(problems_of_switches(4000, warm)) == ["islands.ramp.0.1"]
    assert problems_of_switches(4400, warm, warm_start_steps=400) == {}


def test_counterparts_of_short_rounds_are_frozen_together() -> None:
    """Two rounds of three updates are within a freeze of five, and one of five."""
    often = {"interval": 10, "descent_rate": 10.0}
    assert list(problems_of_switches(600, {"every": 3}, **often)) == ["islands.every"]
    assert problems_of_switches(600, {"every": 3}, **often, freeze_steps=3) == {}


@pytest.mark.parametrize(("key", "value"), [("fragments", 2), ("overlap", 1)])
def test_nothing_is_on_its_way_where_vectors_are_switched(key: str, value: int) -> None:
    islands = {"every": 20, "transport": {key: value}}
    found = problems_of_switches(4000, islands)
    assert list(found) == [f"islands.transport.{key}"]
    assert f"write {1 if key == 'fragments' else 0}" in found[f"islands.transport.{key}"]


@pytest.mark.parametrize(
    ("ramp", "key", "told"),
    [
        (((15, 2),), "0.0", "write 10 or 20"),
        (((20, 2), (20, 5)), "1.0", "between 20"),
        (((40, 2),), "0.0", "train.steps (40)"),
        (((20, 10),), "0.1", "must be less than islands.every (10)"),
    ],
)
def test_a_ramp_has_stages_that_fit_each_other(
    ramp: tuple[tuple[int, int], ...], key: str, told: str
) -> None:
    found = problems(islands={"ramp": ramp})
    assert list(found) == [f"islands.ramp.{key}"]
    assert told in found[f"islands.ramp.{key}"]


def test_a_ramp_needs_rounds() -> None:
    ramp = ((20, 5),)
    assert problems(islands={"ramp": ramp}) == {}
    assert problems(islands={"ramp": ramp, "transport": {"fragments": 2}}) == {}
    found = problems(islands={"ramp": ramp, "every": 1})
    assert "there are no rounds" in found["islands.ramp"]


def test_islands_train_apart_with_optimizers_of_matrices() -> None:
    assert problems(optimizer={"adapter": "spectral"}) == {}


def test_gradients_are_shared_at_one_update_per_round_with_the_plain_average_only() -> None:
    config = RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": "unused",
            "deepspeed": "unused",
            "method": {"name": "full"},
            "train": {
                "steps": 4,
                "seq_length": 8,
                "micro_batch_size": 1,
                "global_batch_size": 8,
            },
            "parallel": {"islands": 4},
        }
    )
    assert config.islands.share_gradients
    assert as_one_island(config).train.global_batch_size == 2
    moved = config.islands.model_copy(
        update={"outer": config.islands.outer.model_copy(update={"lr": 0.7})}
    )
    assert not moved.share_gradients
    assert not config.islands.model_copy(update={"every": 2}).share_gradients
