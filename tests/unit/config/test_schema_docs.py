"""The schema explains itself, and the hints about it point to keys that exist."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from relora_ds.config.base import Section
from relora_ds.config.keys import run_keys, section_model
from relora_ds.config.methods.catalogue import method_models
from relora_ds.config.model import ModelConfig
from relora_ds.config.reading.suggest import SPELLED_ELSEWHERE, did_you_mean
from relora_ds.config.schema import RunConfig


def models(model: type[Section]) -> Iterator[type[Section]]:
    yield model
    for field in model.model_fields.values():
        nested = section_model(field)
        if nested is not None:
            yield from models(nested)


ROOTS = [RunConfig, ModelConfig, *method_models().values()]


@pytest.mark.parametrize("model", sorted({m for root in ROOTS for m in models(root)}, key=str))
def test_every_field_has_a_docstring(model: type[Section]) -> None:
    assert model.__doc__
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name}"


def test_other_spellings_point_to_our_keys() -> None:
    assert set(SPELLED_ELSEWHERE.values()) <= run_keys()


def test_suggestions() -> None:
    keys = run_keys()
    assert did_you_mean("stps", ["steps", "seed"], keys) == "did you mean `steps`?"
    assert did_you_mean("--lora-r", ["rank"], keys) == "did you mean `method.rank`?"
    assert did_you_mean("betas", ["steps"], keys) == "did you mean `optimizer.betas`?"
    assert did_you_mean("zzz", ["b", "a"]) == "valid names are a, b"
