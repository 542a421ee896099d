"""How a projection W + scale * B @ A (+ S) computes: the cost of each way, and the choice.

Shapes: x (T, n), W (m, n), A (r, n), B (m, r); K micro-batches in an update.

| form    | the dense weight W_eff = W + scale * B @ A (+ S)                 |
|---------|------------------------------------------------------------------|
| `split` | never exists: x W^T and (x A^T) B^T are added up                 |
| `layer` | is composed for one product, and again in the backward pass      |
| `step`  | is composed once and lives for all micro-batches of an update    |

Gradients of the factors come from products with the factors (`low_rank`) or from the dense weight's
gradient dW = dy^T x, which lives for a moment (`dense`). In operations, per micro-batch:

    products with W or W_eff     4 T m n
    split                        2 T r (m + n) forward, 2 T r n backward
    composing                    2 m n r, in one of K micro-batches (`step`) or twice (`layer`)
    low-rank gradients           4 T r (m + n), and 2 T nnz for the elements of S
    dense gradients              2 T m n + 4 m n r

Where an MLP is computed at a padded width, a split form copies W for each of its two products; a
composed weight comes into being at that width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from relora_ds.config.sections import TrainConfig
from relora_ds.model.mlp import pads_odd_widths
from relora_ds.numerics.dtypes import DTYPES
from relora_ds.parallel.footprint import Formulation, UpdateSize
from relora_ds.parallel.linear import Projection
from relora_ds.parallel.low_rank import LowRankProjection
from relora_ds.parallel.shape import method_shape, tp_local_shape

Form = Literal["split", "layer", "step"]
GradientForm = Literal["dense", "low_rank"]

_SHARE_OF_MEMORY = 8
"""Composed weights may take an eighth of a device."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second; only their ratios decide."""

    operations: float
    """Of large matrix products."""
    memory: float
    """Bytes read or written."""
    link: float
    """Bytes exchanged over a tensor-parallel group."""
    latency: float
    """Seconds until a collective has begun."""
    sampled: float
    """Rate of a product that is formed at the support of a sparse matrix only, transposes included,
    relative to `operations`; 0 where there is none."""


_HOST = Rates(8e10, 1e10, 1e10, 1e-4, 0.04)
_RATES: dict[tuple[str, torch.dtype], Rates] = {
    # one core with AVX-512, fp32 measured: 512^2 to 1024^2 and T = 2048
    ("cpu", torch.float32): _HOST,
    ("cpu", torch.float64): Rates(4e10, 1e10, 1e10, 1e-4, 0.04),
    ("cpu", torch.bfloat16): Rates(1.6e11, 1e10, 1e10, 1e-4, 0.0),
    # an H100 without TF32, from its data sheet; sampled: bound of gathers out of L2, not measured
    ("cuda", torch.float32): Rates(5e13, 3e12, 3e11, 2e-5, 0.007),
    ("cuda", torch.float64): Rates(5e13, 3e12, 3e11, 2e-5, 0.007),
    ("cuda", torch.bfloat16): Rates(6.5e14, 3e12, 3e11, 2e-5, 0.0),
}


def rates_of(device: str, dtype: torch.dtype) -> Rates:
    """Rates of a type of device; those of a GPU for types that are not known.

    `meta`, on which a model is rehearsed without memory, has no sampled product.
    """
    rates = _RATES.get((device, dtype)) or _RATES["cuda", dtype]
    return replace(rates, sampled=0.0) if device == "meta" else rates


@dataclass(frozen=True)
class ProductSize:
    """One projection's work on one process in an update."""

    tokens: int
    """T, of one micro-batch."""
    micro_batches: int
    """K."""
    rows: int
    """m, of this process's part of W."""
    cols: int
    """n, of this process's part of W."""
    rank: int
    """r, uncut."""
    element: int = 4
    """Bytes of an element of weights and activations."""
    count: int = 0
    """Elements of S that are set here."""
    shards: int = 1
    """Processes that hold parts of a factor along r; they exchange (T, r) tensors or factors."""
    joined: int = 0
    """Elements of that factor, uncut."""
    padded: bool = False
    """Whether its side that is cut is wider in products than W."""


def product_size(layer: LowRankProjection, update: UpdateSize, count: int = 0) -> ProductSize:
    """A projection's work in an update on this process.

    Args:
        layer: of any device, also as ZeRO stage 3 leaves it.
        update: under way.
        count: elements of its sparse part here.
    """
    cut = layer.shards_inner
    rows, cols = tp_local_shape(layer.lora_B)[0], tp_local_shape(layer.lora_A)[1]
    return ProductSize(
        tokens=update.tokens,
        micro_batches=update.micro_batches,
        rows=rows,
        cols=cols,
        rank=layer.rank,
        element=update.dtype.itemsize,
        count=count,
        shards=layer.spec.tp.size if cut else 1,
        joined=method_shape(getattr(layer, layer.inner_factor[0])).numel() if cut else 0,
        padded=layer.spec.product_shape(rows, cols, update) != (rows, cols),
    )


def update_of(
    layers: Iterable[Projection],
    train: TrainConfig,
    stage: int,
    dp_size: int,
    device: str,
    memory: int | None,
) -> UpdateSize:
    """What one update of a run reads on one process, and how it is asked to compute.

    Args:
        layers: the projections that the process holds.
        train: the run's settings.
        stage: of ZeRO.
        dp_size: data-parallel processes.
        device: type of the device that computes.
        memory: bytes of that device; None where there is no telling.
    """
    dtype = DTYPES[train.precision]
    factored = [layer for layer in layers if isinstance(layer, LowRankProjection)]
    composed = dtype.itemsize * sum(
        tp_local_shape(layer.lora_B)[0] * tp_local_shape(layer.lora_A)[1] for layer in factored
    )
    # at stage 3 no process has room for a whole weight of every projection
    room = stage < 3 and (memory is None or composed <= memory // _SHARE_OF_MEMORY)
    return UpdateSize(
        tokens=train.micro_batch_size * train.seq_length,
        micro_batches=max(1, train.global_batch_size // (train.micro_batch_size * dp_size)),
        dtype=dtype,
        formulation=train.formulation,
        device=device,
        keeps_composed=room,
        pads_mlp=pads_odd_widths(train, device),
    )


@dataclass(frozen=True)
class Choice:
    """How a projection computes."""

    form: Form
    gradient: GradientForm

    def __str__(self) -> str:
        words = {
            "split": "never composed",
            "layer": "composed for each product",
            "step": "composed once per update",
        }
        return f"{words[self.form]}, {self.gradient.replace('_', '-')} gradients"


def operations(size: ProductSize, choice: Choice) -> float:
    """Of one micro-batch's products, forward and backward; a sampled product counts as it is.

    Args:
        size: of the projection.
        choice: a split form has low-rank gradients.
    """
    t, m, n = size.tokens, size.rows, size.cols
    # a split form multiplies with its part of a factor, the others with the whole one
    r = size.rank / size.shards if choice.form == "split" else size.rank
    total = 4.0 * t * m * n + _composed(size, choice) * 2.0 * m * n * r
    if choice.form == "split":
        total += 2.0 * t * r * (m + 2.0 * n)
    if choice.gradient == "low_rank":
        return total + 4.0 * t * r * (m + n) + 2.0 * t * size.count
    return total + 2.0 * t * m * n + 4.0 * m * n * r


def seconds(size: ProductSize, choice: Choice, rates: Rates) -> float:
    """Expected time of one micro-batch, without what all choices have in common.

    Args:
        size: of the projection.
        choice: a split form has low-rank gradients.
        rates: of the device.
    """
    t, m, n = size.tokens, size.rows, size.cols
    composed = _composed(size, choice)
    # W is read and W_eff written in place of a second reading; the support is read and added to
    moved = composed * (2.0 * m * n + 2.0 * size.count)
    if choice.form == "split":
        moved += 2.0 * t * (m + n)  # y and dx are added to
        moved += 4.0 * m * n * size.padded
        calls, exchanged = 2.0, 2.0 * t * size.rank
    else:
        # joined wherever W_eff is composed and gradients are formed, and their sum is divided
        calls = composed + (2.0 if choice.form == "step" else 1.0)
        exchanged = calls * size.joined
    if choice.gradient == "dense":
        moved += 3.0 * m * n + 2.0 * size.count
    total = operations(size, choice) / rates.operations + size.element * moved / rates.memory
    if choice.gradient == "low_rank" and size.count:
        if not rates.sampled:
            return math.inf
        total += 2.0 * t * size.count * (1.0 / rates.sampled - 1.0) / rates.operations
    if size.shards > 1:
        total += calls * rates.latency + size.element * exchanged / rates.link
    return total


def _composed(size: ProductSize, choice: Choice) -> float:
    """How often a micro-batch composes the weight."""
    return {"split": 0.0, "layer": 2.0, "step": 1.0 / size.micro_batches}[choice.form]


@functools.lru_cache(maxsize=256)
def choose(
    size: ProductSize,
    asked: Formulation,
    room: bool,
    rates: Rates,
    gradient: GradientForm | Literal["auto"] = "auto",
) -> Choice:
    """The cheapest way that is allowed.

    Args:
        size: of the projection.
        asked: a form by name, which is taken, or `auto`.
        room: whether composed weights may be kept; without it `auto` does not.
        rates: of the device.
        gradient: a form by name, or `auto`.
    """
    forms: tuple[Form, ...] = ("step", "layer", "split") if asked == "auto" else (asked,)
    if asked == "auto" and not room:
        forms = forms[1:]
    if size.count:  # a sparse part has no split form
        forms = tuple(form for form in forms if form != "split") or ("layer",)
    allowed = [
        Choice(form, each)
        for form in forms
        for each in ("low_rank", "dense")
        if gradient in ("auto", each) and (form, each) != ("split", "dense")
    ]
    return min(allowed, key=lambda choice: seconds(size, choice, rates))
