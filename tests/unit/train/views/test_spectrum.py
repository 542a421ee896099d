"""Singular values of what training added, and of the terms that it is made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from relora_ds.checkpoint.export.hf import export_hf
from relora_ds.cli.main import main
from relora_ds.config.methods.sltrain import SLTrainConfig
from relora_ds.errors import ConfigError
from relora_ds.methods.sltrain.sltrain import SLTrain, SparseLowRankLinear
from relora_ds.parallel.linear import LinearSpec
from relora_ds.train.views.spectrum import UPDATE, Spectrum, draw_spectra, spectra
from tests.golden.make_checkpoint import checkpoint


def of(values: list[float]) -> Spectrum:
    return Spectrum("m", "model.layers.0.mlp.up_proj", UPDATE, np.array(values))


def test_ranks_of_known_spectra() -> None:
    assert of([2.0, 2.0, 2.0, 2.0]).effective_rank == pytest.approx(4.0)
    assert of([5.0, 0.0, 0.0]).effective_rank == pytest.approx(1.0)
    assert 1.0 < of([5.0, 1.0, 0.0]).effective_rank < 2.0
    assert of([0.0, 0.0]).effective_rank == 0.0
    assert of([1.0, 0.5, 0.009]).numerical_rank == 2
    assert of([0.0, 0.0]).numerical_rank == 0


def test_a_merge_and_a_live_adapter_add_up_to_twice_the_rank() -> None:
    """The golden run has merged rank 2 once, and gone on with a fresh adapter of rank 2."""
    found = spectra(checkpoint("relora", 2))
    by_part = {
        part: [each for each in found if each.part == part]
        for part in (UPDATE, "weight", "adapter")
    }
    assert [len(each) for each in by_part.values()] == [7, 7, 7]
    assert {each.numerical_rank for each in by_part["adapter"]} == {2}
    assert {each.numerical_rank for each in by_part["weight"]} == {2}
    assert {each.numerical_rank for each in by_part[UPDATE]} <= {3, 4}


def test_a_model_is_compared_with_another_one(tmp_path: Path) -> None:
    export_hf(checkpoint("relora", 2), tmp_path / "hf", torch.float32)
    same = spectra(tmp_path / "hf", since=checkpoint("relora", 2))
    assert {each.part for each in same} == {UPDATE}
    assert max(each.values.max() for each in same) < 1e-5
    with pytest.raises(ConfigError, match="name a model with --since"):
        spectra(tmp_path / "hf")


def test_sparse_and_low_rank_parts_add_up_to_the_weight() -> None:
    method = SLTrain(SLTrainConfig(name="sltrain", rank=3, sparsity=0.1), 42, 1)
    layer = method.linear(LinearSpec("model.layers.0.mlp.up_proj", 20, 30, False, "column"))
    assert isinstance(layer, SparseLowRankLinear)
    with torch.no_grad():
        method.initialize(layer, torch.zeros(30, 20))
        layer.lora_B.normal_()
        parts = method.parts(layer)
        assert int((parts["sparse"].abs() > 1e-6).sum()) == layer.values.numel()
        assert int(torch.linalg.matrix_rank(parts["low-rank"])) == 3
        torch.testing.assert_close(parts["sparse"] + parts["low-rank"], method.dense_weight(layer))


def test_the_verb_draws_several_models_and_writes_their_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(checkpoint("relora", 2)), str(checkpoint("switchlora", 0))]
    picture, figures = tmp_path / "s.png", tmp_path / "s.json"
    arguments = ["--output", str(picture), "--json", str(figures), "--checkpoint", *models]
    assert main(["plot-spectrum", *arguments]) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(figures.read_text())
    assert {each["model"] for each in found} == {Path(model).name for model in models}
    assert all(
        sorted(each["singular_values"], reverse=True) == each["singular_values"] for each in found
    )


def test_every_kind_of_projection_has_its_panels() -> None:
    figure = draw_spectra(spectra(checkpoint("relora", 2)))
    assert len(figure.axes) == 14
    titles = [axes.get_title() for axes in figure.axes[:7]]
    assert titles[0] == "q_proj"
    assert titles[-1] == "down_proj"
