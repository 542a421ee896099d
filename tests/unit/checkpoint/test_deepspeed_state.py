"""DeepSpeed's shards of every stage are read as the same values by parameter name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.checkpoint.deepspeed_state import DeepSpeedShards
from relora_ds.checkpoint.inventory import Inventory
from relora_ds.engine.deepspeed.files import model_file, optimizer_file, sliced_model_file
from relora_ds.errors import CheckpointError
from relora_ds.optim.vector_adamw import MOMENTS

RANKS = 2
GROUPS = [{"a": torch.Size((2, 3)), "b": torch.Size((5,))}, {"c": torch.Size((3,))}]
FROZEN = {"w": torch.Size((3, 3))}
INVENTORY = Inventory(GROUPS, FROZEN, frozenset(), "working", torch.float32)
KINDS = ("master", *MOMENTS)
STEP = 7

Values = dict[str, torch.Tensor]
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def values() -> Values:
    """Every value of the state by kind and name, no two alike."""
    torch.manual_seed(0)
    found = {f"{kind}.{name}": torch.randn(s) for kind in KINDS for name, s in _trained().items()}
    return found | {f"working.{name}": torch.randn(shape) for name, shape in FROZEN.items()}


def _trained() -> dict[str, torch.Size]:
    return INVENTORY.trained


def _module(values: Values) -> Values:
    return {n: values[f"master.{n}"] for n in _trained()} | {n: values[f"working.{n}"] for n in "w"}


def _cut(value: torch.Tensor, rank: int) -> torch.Tensor:
    """A rank's part of a flattened tensor, the last one padded."""
    flat = value.flatten()
    share = -(-flat.numel() // RANKS)
    padded = torch.cat([flat, torch.full((share * RANKS - flat.numel(),), 99.0)])
    return padded[rank * share : (rank + 1) * share].clone()


def _whole(values: Values, directory: Path) -> None:
    """Stage 0."""
    states = {
        index: {"step": torch.tensor(STEP), **{key: values[f"{key}.{name}"] for key in MOMENTS}}
        for index, name in enumerate(_trained())
    }
    content = {"module": _module(values), "optimizer": {"state": states}}
    torch.save(content, directory / model_file(0))


def _wrapped(values: Values, directory: Path) -> None:
    """Stage 0 of a bf16 model: masters and moments are kept by DeepSpeed's wrapper."""
    _whole(values, directory)
    content = torch.load(directory / model_file(0))
    masters = [[values[f"master.{name}"] for name in group] for group in GROUPS]
    content["optimizer"] = {"optimizer_state_dict": content["optimizer"], "fp32_groups": masters}
    content["module"] |= {name: torch.zeros(shape) for name, shape in _trained().items()}
    torch.save(content, directory / model_file(0))


def _flat(values: Values, directory: Path) -> None:
    """Stages 1 and 2."""
    torch.save({"module": _module(values)}, directory / model_file(0))
    for rank in range(RANKS):
        flats = [
            {k: _cut(torch.cat([values[f"{k}.{n}"].flatten() for n in group]), rank) for k in KINDS}
            for group in GROUPS
        ]
        states = {
            number: {"step": STEP, **{key: flat[key] for key in MOMENTS}}
            for number, flat in enumerate(flats)
        }
        content = {
            "single_partition_of_fp32_groups": [flat["master"] for flat in flats],
            "base_optimizer_state": {"state": states},
        }
        path = directory / optimizer_file(rank, 0, torch.float32)
        torch.save({"optimizer_state_dict": content}, path)


def _partitions(values: Values, directory: Path) -> None:
    """Stage 3."""
    for rank in range(RANKS):
        model = {
            "param_shapes": [dict(group) for group in GROUPS],
            "frozen_param_shapes": dict(FROZEN),
            "frozen_param_fragments": {n: _cut(values[f"working.{n}"], rank) for n in FROZEN},
        }
        torch.save(model, directory / sliced_model_file(rank, 0))
        flats = [
            {key: torch.cat([_cut(values[f"{key}.{n}"], rank) for n in group]) for key in KINDS}
            for group in GROUPS
        ]
        states = {
            index: {"step": STEP, **{key: flat[key] for key in MOMENTS}}
            for index, flat in enumerate(flats)
        }
        content = {
            "fp32_flat_groups": [flat["master"] for flat in flats],
            "optimizer_state_dict": {"state": states},
        }
        path = directory / optimizer_file(rank, 0, torch.float32)
        torch.save({"optimizer_state_dict": content}, path)


FORMS = {
    "whole": (0, _whole),
    "wrapped": (0, _wrapped),
    "flat": (2, _flat),
    "cut": (3, _partitions),
}


def _edit(path: Path, change: Edit) -> None:
    content = torch.load(path)
    change(content)
    torch.save(content, path)


def _read(directory: Path, stage: int) -> DeepSpeedShards:
    return DeepSpeedShards(directory, INVENTORY, stage, RANKS, 0)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_values(form: str, values: Values, tmp_path: Path) -> None:
    stage, write = FORMS[form]
    write(values, tmp_path)
    found = _read(tmp_path, stage)
    assert found.completed == STEP
    assert found.pieces.keys() == values.keys()
    for key, value in values.items():
        pieces = found.pieces[key]
        assert pieces.length == value.numel(), key
        assert torch.equal(pieces.read(0, value.numel()), value.flatten()), key
        assert torch.equal(pieces.read(1, 2), value.flatten()[1:3]), key  # also across a cut


@pytest.mark.parametrize("form", FORMS)
def test_before_the_first_update_there_are_no_moments(
    form: str, values: Values, tmp_path: Path
) -> None:
    stage, write = FORMS[form]
    write(values, tmp_path)

    def forget(content: dict[str, Any]) -> None:
        for key in [key for key in content if key == "state"]:
            content[key] = {}
        for inner in [value for value in content.values() if isinstance(value, dict)]:
            forget(inner)

    for path in tmp_path.iterdir():
        _edit(path, forget)
    found = _read(tmp_path, stage)
    assert found.completed == 0
    assert found.pieces.keys() == {k for k in values if k.startswith(("master.", "working."))}


def test_parts_of_different_updates_are_refused(values: Values, tmp_path: Path) -> None:
    _flat(values, tmp_path)

    def advance(content: dict[str, Any]) -> None:
        content["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["step"] = STEP + 1

    _edit(tmp_path / optimizer_file(1, 0, torch.float32), advance)
    with pytest.raises(CheckpointError, match="its updates 7 and 8: files of several checkpoints"):
        _read(tmp_path, 2)


@pytest.mark.parametrize(("name", "shape"), [("a", (3, 2)), ("w", (9,)), ("c", None)])
@pytest.mark.parametrize("form", ["whole", "cut"])
def test_parameters_of_another_run_are_refused_by_name(
    form: str, name: str, shape: tuple[int, ...] | None, values: Values, tmp_path: Path
) -> None:
    stage, write = FORMS[form]
    write(values, tmp_path)

    def change(content: dict[str, Any]) -> None:
        groups = content.get("param_shapes", [])
        for held in (content.get("module"), content.get("frozen_param_shapes"), *groups):
            if held is not None and name in held:
                tensor = torch.zeros(shape or ())
                held[name] = tensor if form == "whole" else tensor.shape
                if shape is None:
                    del held[name]

    for path in tmp_path.glob("*model_states.pt"):
        _edit(path, change)
    held = "not at all" if shape is None else f"as {tuple(shape)}"
    with pytest.raises(CheckpointError) as refused:
        _read(tmp_path, stage)
    assert f"{tmp_path}: holds {name} {held}, but its run has it as" in str(refused.value)


def test_moments_of_another_form_are_left_out(values: Values, tmp_path: Path) -> None:
    _whole(values, tmp_path)

    def encode(content: dict[str, Any]) -> None:
        state = content["optimizer"]["state"][0]
        state[MOMENTS[0]] = state[MOMENTS[0]].to(torch.uint8)

    _edit(tmp_path / model_file(0), encode)
    assert values.keys() - _read(tmp_path, 0).pieces.keys() == {f"{MOMENTS[0]}.a"}
