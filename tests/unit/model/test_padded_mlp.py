"""MLPs of widths that do not fill aligned rows are computed at wider ones, and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import pytest
import torch
from pydantic import TypeAdapter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from relora_ds.config.methods.catalogue import MethodConfig
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.methods.formulation.choice import (
    Choice,
    Form,
    GradientForm,
    product_size,
    rates_of,
    seconds,
    update_of,
)
from relora_ds.methods.registry import METHODS
from relora_ds.model.mlp import MLP, is_padded
from relora_ds.numerics.padding import cut, padded, padded_width
from relora_ds.numerics.products import offer_place
from relora_ds.parallel.footprint import Formulation, UpdateSize
from relora_ds.parallel.linear import Projection, weights_stay
from relora_ds.parallel.low_rank import LowRankProjection

WIDTH, FFN, RANK = 16, 37, 8
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": RANK, "alpha": 8, "trainable_scaling": True},
    "relora": {"name": "relora", "rank": RANK, "alpha": 8, "merge_every": 10},
    "switchlora": {"name": "switchlora", "rank": RANK},
    "sltrain": {"name": "sltrain", "rank": RANK, "alpha": 8, "sparsity": 0.1},
    "low_rank": {"name": "low_rank", "rank": RANK},
    "galore": {"name": "galore", "rank": RANK},
}
COMPOSED = ("lora", "relora", "switchlora", "sltrain")
COMPOSED_WAYS: list[tuple[Form, GradientForm]] = [
    ("layer", "low_rank"),
    ("layer", "dense"),
    ("step", "low_rank"),
    ("step", "dense"),
]
CASES: list[tuple[str, Form, GradientForm]] = []
for name_of_case in METHOD_SETTINGS:
    if name_of_case != "sltrain":  # a sparse part has no split form
        CASES.append((name_of_case, "split", "low_rank"))
    if name_of_case in COMPOSED:
        for composed_form, gradient_form in COMPOSED_WAYS:
            CASES.append((name_of_case, composed_form, gradient_form))


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """Whatever is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(8).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[Form, GradientForm], None]:
    """Has all projections that have a choice compute in this way."""

    def forced(form: Form, gradient: GradientForm) -> None:
        for module in ("adapter", "sltrain.sltrain"):
            name = f"relora_ds.methods.{module}.choose"
            monkeypatch.setattr(name, lambda *_: Choice(form, gradient))

    return forced


def architecture(ffn: int, bias: bool = False) -> ModelConfig:
    return ModelConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=ffn,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        mlp_bias=bias,
    )


def build(name: str, dtype: torch.dtype = torch.float64, bias: bool = False) -> MLP:
    """An MLP of 16 and 37 columns of which every trained value is non-zero."""
    config = TypeAdapter(MethodConfig).validate_python(METHOD_SETTINGS[name])
    method = METHODS[name](cast(Any, config), 1, 100)
    mlp = MLP(architecture(FFN, bias), method.linear, "model.layers.0.mlp")
    generator = torch.Generator().manual_seed(3)
    for layer in projections(mlp):
        rows, cols = layer.spec.out_features, layer.spec.in_features
        with torch.no_grad():
            method.initialize(layer, torch.randn(rows, cols, generator=generator))
        for parameter in layer.parameters():
            parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return mlp


def projections(mlp: MLP) -> list[Projection]:
    return [module for module in mlp.modules() if isinstance(module, Projection)]


def batches(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and gradients of the outputs of two micro-batches of six tokens."""
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(2, 2, 2, 3, WIDTH, generator=generator).to(dtype)
    return [(x.clone().requires_grad_(), slope) for x, slope in drawn]


def run(mlp: MLP, pads: bool, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Outputs, gradients of inputs and sums of gradients of parameters over two micro-batches."""
    mlp.zero_grad()
    update = UpdateSize(6, 2, dtype, pads_mlp=pads)
    found = []
    with weights_stay(projections(mlp), update):
        for x, slope in batches(dtype):
            recomputed = projections(mlp)[0].recomputed
            out = checkpoint(mlp, x, use_reentrant=False) if recomputed else mlp(x)
            assert isinstance(out, torch.Tensor)
            out.backward(slope)
            assert x.grad is not None
            found += [out.detach(), x.grad]
    trained = [p for p in mlp.parameters() if p.requires_grad]
    return found + [cast(torch.Tensor, p.grad).clone() for p in trained]


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative difference in norm of two lists."""
    assert [t.shape for t in found] == [t.shape for t in expected]
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(("name", "form", "gradient"), CASES)
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_padded_mlp_computes_the_same(
    name: str,
    form: Form,
    gradient: GradientForm,
    recomputed: bool,
    dtype: torch.dtype,
    tolerance: float,
    force: Callable[[Form, GradientForm], None],
) -> None:
    force(form, gradient)
    mlp = build(name, dtype, bias=recomputed)
    for layer in projections(mlp):
        layer.recomputed = recomputed
    expected = run(mlp, False, dtype)
    assert all(bool(tensor.abs().max() > 0.0) for tensor in expected)
    assert difference(run(mlp, True, dtype), expected) < tolerance


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("full", "auto"),
        ("relora", "split"),
        ("relora", "layer"),
        ("low_rank", "auto"),
        ("galore", "auto"),
        ("sltrain", "layer"),
    ],
)
def test_gradients_are_written_where_the_engine_wants_them(name: str, form: str) -> None:
    mlp = build(name)
    x, slope = batches(torch.float64)[0]
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(mlp(x), trained, slope)
    stretches = []
    for parameter in trained:
        # a stretch of one tensor, as the engine's places are: nothing may be written beside it
        stretch = torch.zeros(parameter.numel() + 16, dtype=parameter.dtype)
        offer_place(parameter, partial(stretch[8:-8].view, parameter.shape))
        stretches.append(stretch)
    update = UpdateSize(6, 1, torch.float64, cast(Formulation, form), pads_mlp=True)
    with weights_stay(projections(mlp), update):
        mlp(x).backward(slope)
    for parameter, stretch, wanted in zip(trained, stretches, expected, strict=True):
        assert not stretch[:8].any()
        assert not stretch[-8:].any()
        if parameter.dim() == 2:  # the values of a sparse matrix are handed over
            assert difference([stretch[8:-8].view(wanted.shape)], [wanted]) < 1e-12


class _Products(TorchDispatchMode):
    """Writes down the matrices of every product: extents and distances of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Size, tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            matrices = [each for each in (*args, out) if isinstance(each, torch.Tensor)]
            self.seen += [(each.shape, each.stride()) for each in matrices]
        assert func.overloadpacket != torch.ops.aten.bmm
        return out


@pytest.mark.parametrize(("name", "form", "gradient"), CASES)
def test_rows_of_every_matrix_of_a_product_are_aligned(
    name: str, form: Form, gradient: GradientForm, force: Callable[[Form, GradientForm], None]
) -> None:
    force(form, gradient)
    mlp = build(name)
    with _Products() as products:
        run(mlp, True)
    assert len(products.seen) >= 3 * 3 * 2 * 3, "three products of three projections, twice"
    for shape, strides in products.seen:
        assert min(strides) == 1, (shape, strides)
        assert max(strides) % 8 == 0, (shape, strides)
        assert shape[strides.index(1)] % 8 == 0, (shape, strides)
    with _Products() as products:
        run(mlp, False)
    assert any(max(strides) % 8 for _, strides in products.seen), "nothing was there to mend"


def test_only_rows_that_are_not_aligned_are_widened() -> None:
    # bytes are 16 in fp64 from every second element on, in bf16 from every eighth
    assert [padded_width(width, 8) for width in (36, 37, 38, 40)] == [36, 40, 38, 40]
    assert [padded_width(width, 2) for width in (36, 37, 40, 5461)] == [40, 40, 40, 5464]
    matrix = torch.ones(3, 5)
    assert padded(matrix, 3, 5) is matrix
    assert cut(matrix, 3, 5) is matrix
    whole = padded(matrix, 4, 8)
    assert whole.shape == (4, 8)
    assert whole.sum() == 15.0
    assert torch.equal(cut(whole, 3, 5), matrix)


@pytest.mark.parametrize(
    ("asked", "device", "tokens", "pads"),
    [
        ("auto", "cpu", 4096, False),
        ("auto", "cuda", 4096, True),
        ("auto", "cuda", 4088, False),
        ("on", "cpu", 8, True),
        ("off", "cuda", 4096, False),
    ],
)
def test_runs_with_tokens_enough_pad_on_gpus_unless_told_otherwise(
    asked: str, device: str, tokens: int, pads: bool
) -> None:
    values = {"steps": 1, "seq_length": 8, "global_batch_size": 512}
    values["micro_batch_size"] = tokens // 8
    train = TrainConfig.model_validate({**values, "pad_mlp": asked})
    mlp = build("relora")
    update = update_of(projections(mlp), train, 1, 1, device, None)
    assert update.mlp_width(FFN) == (40 if pads else FFN)
    assert is_padded(architecture(FFN), train, device) is pads
    assert not is_padded(architecture(40), train, device)
    # 37 columns are cut into 19 and 18; of 48 both halves are aligned
    assert is_padded(architecture(FFN), train, device, 2) is pads
    assert not is_padded(architecture(48), train, device, 2)


def test_a_split_form_pays_for_copies_of_the_weight() -> None:
    layer = projections(build("relora"))[2]
    assert isinstance(layer, LowRankProjection)
    rates = rates_of("cuda", torch.bfloat16)
    plain, wide = (
        product_size(layer, UpdateSize(6, 2, torch.bfloat16, pads_mlp=pads))
        for pads in (False, True)
    )
    split, step = Choice("split", "low_rank"), Choice("step", "low_rank")
    more = seconds(wide, split, rates) - seconds(plain, split, rates)
    assert more == pytest.approx(2 * 4 * WIDTH * FFN / rates.memory)
    assert seconds(wide, step, rates) == seconds(plain, step, rates)


def test_generation_and_whatever_is_no_update_computes_as_ever() -> None:
    mlp = build("full")
    assert mlp.gate_proj(torch.zeros(1, WIDTH, dtype=torch.float64)).shape == (1, FFN)
