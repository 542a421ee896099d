"""Which keys a resumed run may change is said beside them."""

from __future__ import annotations

from typing import Literal

from relora_ds.config.base import Free, PositiveInt, Section
from relora_ds.config.free import free_keys
from relora_ds.config.keys import run_keys
from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.methods.catalogue import registered
from relora_ds.config.schema import RunConfig

FREE = {
    "output_dir",
    "model",
    "deepspeed",
    "data.cache_dir",
    "data.train",
    "data.valid",
    "data.verify",
    "data.tokenizer",
    "train.micro_batch_size",
    "train.attention",
    "train.compile",
    "train.formulation",
    "train.pad_mlp",
    "train.activation_checkpointing",
    "train.deterministic",
    "train.digest_every",
    "train.timeout_minutes",
    "train.init_from",
    "parallel",
    "eval",
    "checkpoint",
    "guards",
    "log",
}


class Inner(Section):
    """A section within settings."""

    free: Free[int | None] = None
    """May change."""
    bound: int = 0
    """May not."""


class FirstConfig(MethodSettings):
    """Settings of a method."""

    name: Literal["first"]
    """Registry key."""
    rank: PositiveInt = 1
    """A key of other methods too, none of which lets it change."""
    shared: Free[int] = 0
    """Free here, bound in the other."""
    alone: Free[PositiveInt] = 1
    """A key of this method only."""
    inner: Inner = Inner()
    """More of it."""


class SecondConfig(MethodSettings):
    """Settings of another method."""

    name: Literal["second"]
    """Registry key."""
    shared: int = 0
    """May not change."""
    inner: Free[Inner] = Inner()
    """All of it may change here."""


def test_the_run_may_change_these_and_no_others() -> None:
    assert free_keys(RunConfig) == FREE
    assert run_keys() >= FREE


def test_methods_may_mark_their_keys() -> None:
    with registered(FirstConfig):
        assert free_keys(RunConfig) == FREE | {
            "method.shared",
            "method.alone",
            "method.inner.free",
        }
        with registered(SecondConfig):
            assert free_keys(RunConfig) - FREE >= {"method.alone"}
            assert "method.shared" not in free_keys(RunConfig)
    assert free_keys(RunConfig) == FREE


def test_keys_are_relative_to_the_section() -> None:
    assert free_keys(Inner) == {"free"}
    assert free_keys(FirstConfig) == {"shared", "alone", "inner.free"}
    assert free_keys(SecondConfig) == {"inner"}


def test_a_mark_changes_neither_type_nor_limits() -> None:
    field = FirstConfig.model_fields["alone"]
    assert field.annotation is int
    assert field.description == "A key of this method only."
    assert FirstConfig.model_validate({"name": "first", "alone": 3}).alone == 3
