"""Singular values of what training added to every projection, and of the terms that it is made of.

The update is the dense weight now, less that at the start: the run's initial draw, which follows
from its seed, or another model. Where a method's weight is a sum (a frozen weight and an adapter, a
low-rank and a sparse matrix), the change of each term is looked at apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.format.record import RunRecord
from relora_ds.config.model import projection_shapes
from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.methods.build import DenseWeights, meta_model
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.train.views.figures import COLOURS, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UPDATE = "update"
"""Name of the whole change of a projection, beside those of its terms."""
_LEAST_SHOWN = 1e-6  # below it are the rounding errors of fp32
Parts = Callable[[str], Mapping[str, torch.Tensor]]
"""Terms of a projection's weight (out, in) by name, fp32; the sum is theirs. None but the sum where
the terms are not known."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one change of one projection."""

    model: str
    """Where it was read."""
    projection: str
    """Full name, such as ``model.layers.0.self_attn.q_proj``."""
    part: str
    """`update`, or the name of a term."""
    values: np.ndarray
    """fp64, descending, (smaller side,)."""

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the values as shares of their sum (Roy and Vetterli, 2007)."""
        shares = self.values / self.values.sum() if self.values.any() else np.zeros(0)
        shares = shares[shares > 0.0]
        return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0

    @property
    def numerical_rank(self) -> int:
        """Values above a hundredth of the largest."""
        return int((self.values > 0.01 * self.values.max(initial=0.0)).sum())

    def as_dict(self) -> dict[str, Any]:
        """For a program."""
        return {
            "model": self.model,
            "projection": self.projection,
            "part": self.part,
            "effective_rank": self.effective_rank,
            "numerical_rank": self.numerical_rank,
            "singular_values": self.values.tolist(),
        }


def spectra(path: Path, since: Path | None = None) -> list[Spectrum]:
    """Spectra of every projection of a model, in the model's order.

    Args:
        path: a checkpoint of ours, or a Hugging Face directory.
        since: the model that it is compared with; None for the one that its run began with.

    Raises:
        CheckpointError: a model cannot be read, or the two are of different shapes.
        ConfigError: nothing says what the model began with.
    """
    model = DenseModel(path)
    now, before = _parts_of(model), _start(model) if since is None else _parts_of(DenseModel(since))
    found = []
    for layer in range(model.architecture.num_hidden_layers):
        for projection in projection_shapes(model.architecture):
            name = f"model.layers.{layer}.{projection}"
            for part, change in _changes(now(name), before(name), name):
                values = torch.linalg.svdvals(change).double().numpy()
                found.append(Spectrum(path.resolve().name, name, part, values))
    return found


def _changes(
    now: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], name: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole change, then those of the terms if there are several."""
    whole, earlier = sum(now.values()), sum(before.values())
    assert isinstance(whole, torch.Tensor)
    assert isinstance(earlier, torch.Tensor)
    if whole.shape != earlier.shape:
        raise CheckpointError(
            f"{name} is {tuple(whole.shape)} in one model and {tuple(earlier.shape)} in the other: "
            "compare models of one architecture"
        )
    yield UPDATE, whole - earlier
    for part, value in now.items() if len(now) > 1 else ():
        yield part, value - before.get(part, torch.zeros_like(value))


def _parts_of(model: DenseModel) -> Parts:
    weights = model.weights()
    if isinstance(weights, DenseWeights):
        return lambda name: weights.parts(f"{name}.weight")
    return lambda name: {"weight": weights[f"{name}.weight"]}


def _start(model: DenseModel) -> Parts:
    """What a run began with.

    Raises:
        ConfigError: it is not known.
    """
    if model.saved is None or model.saved.is_import:
        raise ConfigError(
            f"{model.path} does not say what it was trained from: name a model with --since"
        )
    record = model.saved.record
    if record.config.train.init_from is not None:
        return _parts_of(DenseModel(Path(record.config.train.init_from)))
    return _drawn(record)


def _drawn(record: RunRecord) -> Parts:
    """The terms as the run's first phase draws them."""
    config, architecture = record.config, record.architecture
    method = plan_phases(config)[0].method
    source = InitialWeights(architecture, config.train.seed)
    layers = projection_layers(meta_model(architecture, method, config.train))

    @torch.no_grad()
    def parts(name: str) -> dict[str, torch.Tensor]:
        layer = layers[name].to_empty(device="cpu")
        shape = layer.spec.out_features, layer.spec.in_features
        draw = source(f"{name}.weight", shape)
        method.initialize_at_random(layer, lambda: draw, architecture.initializer_range)
        found = method.parts(layer)
        layer.to("meta")
        return found

    return parts


def draw_spectra(found: Sequence[Spectrum]) -> Figure:
    """Effective ranks by layer and singular values, one column per kind of projection.

    Values are drawn as shares of the largest, averaged over the layers, on a logarithmic axis.
    """
    kinds = list(dict.fromkeys(_kind(each) for each in found))
    lines = list(dict.fromkeys((each.model, each.part) for each in found))
    figure = new_figure(2.6 * len(kinds), 5.4)
    axes = figure.subplots(2, len(kinds), squeeze=False, sharey="row")
    for column, kind in enumerate(kinds):
        above, below = axes[0][column], axes[1][column]
        for number, (model, part) in enumerate(lines):
            own = [e for e in found if (e.model, e.part, _kind(e)) == (model, part, kind)]
            if not own:
                continue
            colour, label = COLOURS[number % len(COLOURS)], plain(f"{model}: {part}")
            above.plot([e.effective_rank for e in own], "o-", ms=3, color=colour, label=label)
            shares = [e.values / (e.values.max(initial=0.0) or 1.0) for e in own]
            mean = np.mean(shares, axis=0)
            shown = np.where(mean > _LEAST_SHOWN, mean, np.nan)
            below.semilogy(np.arange(1, len(mean) + 1), shown, color=colour)
        above.set_title(kind, fontsize=10)
        above.set_xlabel("layer", fontsize=8)
        below.set_xlabel("number", fontsize=8)
    axes[0][0].set_ylabel("effective rank")
    axes[1][0].set_ylabel("singular value / largest")
    axes[0][0].legend(fontsize=7)
    return figure


def _kind(spectrum: Spectrum) -> str:
    return spectrum.projection.rpartition(".")[2]
