"""Stage B: operations on the device against the CPU (integers and draws: bit for bit) or fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.case import Case, Figures, Sizes
from benchmarks.gpu.cases import own_kernels
from relora_ds.model.init import InitialWeights, dense_shapes
from relora_ds.model.llama import Llama
from relora_ds.model.loss import linear_cross_entropy
from relora_ds.model.mlp import MLP
from relora_ds.model.rope import rotary_tables, rotate
from relora_ds.numerics.base_weight import Residual, apply_product
from relora_ds.numerics.batched.fingerprints import fingerprint
from relora_ds.numerics.codes.block_codes import BLOCK, Codes
from relora_ds.numerics.rounding import round_at_random
from relora_ds.optim.vector_adamw import VectorAdamW
from relora_ds.parallel.linear import DenseLinear
from relora_ds.randomness import Stream

CPU = torch.device("cpu")
_ODD = (1, 255, 257, 4099)


def cases(tiny: bool) -> list[Case]:
    """All of the stage."""
    functions: list[Callable[[torch.device, Sizes], Figures]] = [
        residual,
        codes,
        rounding,
        fingerprints,
        draws,
        initial_weights,
        cross_entropy,
        rotation,
        gating,
        compiled_layers,
        optimizer,
    ]
    named = [(function.__name__.replace("_", " "), function) for function in functions]
    found = [Case("B", name, function, expected_s=4, value=8) for name, function in named]
    return found + own_kernels.cases()


def _values(count: int, seed: int = 3) -> torch.Tensor:
    """fp32 values of many sizes and both signs; the same on every machine."""
    draw = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 20, (count,), generator=draw).float()
    return torch.randn(count, generator=draw) * exponents.exp2()


def _leaf(values: torch.Tensor, place: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A copy that gets a gradient."""
    return values.to(place, dtype, copy=True).requires_grad_()


def _same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Bit for bit, whatever the type."""
    a, b = (each.detach().cpu().contiguous().view(-1) for each in (found, expected))
    assert a.dtype == b.dtype, f"{what}: {a.dtype} is not {b.dtype}"
    differing = int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
    assert differing == 0, f"{what}: {differing} of {a.numel() * a.element_size()} bytes differ"


def residual(device: torch.device, sizes: Sizes) -> Figures:
    """The exact bf16 base: splitting and restoring words, and an edit by a product."""
    for count in (*_ODD, sizes.pick(1 << 10, 1 << 22)):
        exact = _values(count)
        words = []
        for place in (device, CPU):
            working = torch.full((count,), torch.nan, dtype=torch.bfloat16, device=place)
            base = Residual(working, exact.to(place))
            _same(base.load(working, 0), exact, f"{count} restored words")
            words.append((working, base.low))
        for name, pair in zip(("upper", "lower"), zip(*words, strict=True), strict=True):
            _same(pair[0], pair[1], f"{name} halves of {count} words")
    rows, cols, rank = 45, 67, 5
    exact = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))
    left, right = exact[:, :rank].contiguous(), exact[:rank].contiguous()
    expected = exact.double() + 0.5 * (left.double() @ right.double())
    working = torch.empty(rows * cols, dtype=torch.bfloat16, device=device)
    base = Residual(working, exact.view(-1).to(device))
    apply_product(base, working, 0, left.to(device), right.to(device), 0.5)
    error = float((base.load(working, 0).cpu().view(rows, cols) - expected).abs().max())
    assert error <= 4e-6, f"an edit is off by {error:.2g}; is TF32 on?"
    return {"edit_error": error}


def codes(device: torch.device, sizes: Sizes) -> Figures:
    """Eight-bit moments: codes, scales and decoded values."""
    for count in (*_ODD, sizes.pick(1 << 10, 1 << 22)):
        for kind in (torch.int8, torch.uint8):
            values = _values(count) if kind.is_signed else _values(count).abs()
            found = []
            for place in (device, CPU):
                scales = torch.full((-(-count // BLOCK),), torch.nan, device=place)
                stored = Codes(torch.full((count,), 77, dtype=kind, device=place), scales)
                stored.store(values.to(place))
                found.append((stored.codes, stored.scales, stored.load()))
            for name, pair in zip(
                ("codes", "scales", "values"), zip(*found, strict=True), strict=True
            ):
                _same(pair[0], pair[1], f"{name} of {count} {kind} moments")
    return {}


def rounding(device: torch.device, sizes: Sizes) -> Figures:
    """Rounding to bf16 at random, special values included."""
    special = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 3.4e38, -3.4e38, 1e-45])
    for count in (*_ODD, sizes.pick(1 << 10, 1 << 22)):
        values = torch.cat([special, _values(count)])
        found = []
        for place in (device, CPU):
            out = torch.full(values.shape, torch.nan, dtype=torch.bfloat16, device=place)
            round_at_random(values.to(place), out, Stream(5, "round", "w", 2), 8)
            found.append(out)
        _same(found[0], found[1], f"{count} rounded values")
    return {}


def fingerprints(device: torch.device, sizes: Sizes) -> Figures:
    """The digest by which replicas are compared."""
    for count in (*_ODD, sizes.pick(1 << 12, 1 << 22)):
        for values in (_values(count), _values(count).bfloat16(), _values(count).short()):
            _same(fingerprint(values.to(device)), fingerprint(values), f"of {count} {values.dtype}")
    return {}


def draws(device: torch.device, sizes: Sizes) -> Figures:
    """Counter-based draws."""
    stream, count = Stream(9, "init", "model.layers.0.mlp.up_proj.weight", 3), 4099
    for start in (0, 1 << 33):
        for kind in ("words", "uniform", "shorts", "normal"):
            draw = getattr(stream, kind)
            _same(draw(start, count, device), draw(start, count), f"{kind} from {start}")
    index = torch.arange(count).flip(0)
    _same(stream.uniform_at(index.to(device)), stream.uniform_at(index), "uniform at indices")
    return {}


def initial_weights(device: torch.device, sizes: Sizes) -> Figures:
    """The start of a run: the same bits wherever it is drawn."""
    from benchmarks.gpu.runs import architecture

    shape = architecture(sizes)
    initial = InitialWeights(shape, 42)
    shapes = dense_shapes(shape)
    for name, dimensions in shapes.items():
        _same(initial(name, dimensions, device), initial(name, dimensions), name)
    return {"parameters": len(shapes)}


def cross_entropy(device: torch.device, sizes: Sizes) -> Figures:
    """Loss of the head and its gradients, in chunks that do not divide the tokens."""
    tokens, width, vocabulary = 133, 40, 211
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, width, generator=draw)
    weight = torch.randn(vocabulary, width, generator=draw) * 0.1
    targets = torch.randint(0, vocabulary, (tokens,), generator=draw)
    results = []
    for place, dtype in ((device, torch.float32), (CPU, torch.float64)):
        x, w = (_leaf(each, place, dtype) for each in (hidden, weight))
        loss = linear_cross_entropy(x, w, targets.to(place), tokens, rows=64)
        loss.backward()
        results.append(_detached(loss, x.grad, w.grad))
    x, w = (_leaf(each, device, torch.bfloat16) for each in (hidden, weight))
    linear_cross_entropy(x, w, targets.to(device), tokens, rows=16).backward()
    assert w.grad is not None
    # nine chunks: sums in bf16 would be off by several times as much
    error = _close([w.grad], results[1][2:], limit=1e-2)
    return {"error": _close(*results, limit=1e-5), "bf16_error": error}


def rotation(device: torch.device, sizes: Sizes) -> Figures:
    """Rotary positions and their gradient."""
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(2, 33, 3, 16, generator=draw)
    slope = torch.randn(x.shape, generator=draw)
    results = []
    for place, dtype in ((device, torch.float32), (CPU, torch.float64)):
        cos, sin = rotary_tables(16, 10000.0, x.shape[1], place)
        leaf = _leaf(x, place, dtype)
        turned = rotate(leaf, cos, sin)
        turned.backward(slope.to(place, turned.dtype))
        results.append(_detached(turned, leaf.grad))
    return {"error": _close(*results, limit=1e-5)}


def gating(device: torch.device, sizes: Sizes) -> Figures:
    """The feed-forward block of an odd width, and all its gradients."""
    from benchmarks.gpu.runs import architecture

    shape = architecture(sizes)
    draw = torch.Generator().manual_seed(6)
    x, slope = (torch.randn(3, 37, shape.hidden_size, generator=draw) for _ in range(2))
    results = []
    for place, dtype in ((device, torch.float32), (CPU, torch.float64)):
        block = MLP(shape, DenseLinear, "mlp").to(place, dtype)
        with torch.no_grad():
            for seed, parameter in enumerate(block.parameters()):
                values = torch.randn(parameter.shape, generator=draw.manual_seed(seed))
                parameter.copy_(values * 0.1)
        leaf = _leaf(x, place, dtype)
        out = block(leaf)
        out.backward(slope.to(place, dtype))
        results.append(
            _detached(out, leaf.grad, *(parameter.grad for parameter in block.parameters()))
        )
    return {"error": _close(*results, limit=1e-5)}


def compiled_layers(device: torch.device, sizes: Sizes) -> Figures:
    """Loss and all gradients of a model whose layers torch's compiler makes, plain ones in fp64
    beside it; in bf16 beside plain ones there."""
    from benchmarks.gpu.runs import architecture

    shape = architecture(sizes)
    draw = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, shape.vocab_size, (2, 34), generator=draw)

    def passed(place: torch.device, dtype: torch.dtype, compiled: bool) -> list[torch.Tensor]:
        model = Llama(shape, DenseLinear).to(place, dtype)
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                values = torch.randn(parameter.shape, generator=draw.manual_seed(seed))
                parameter.copy_(values * 0.1)
        if compiled:
            model.compile_layers()
        loss = model(tokens.to(place))
        loss.backward()
        return _detached(loss, *(parameter.grad for parameter in model.parameters()))

    exact = passed(CPU, torch.float64, compiled=False)
    half = [passed(device, torch.bfloat16, compiled) for compiled in (True, False)]
    return {
        "error": _close(passed(device, torch.float32, compiled=True), exact, limit=1e-4),
        "bf16_error": _close(*half, limit=5e-2),
    }


def optimizer(device: torch.device, sizes: Sizes) -> Figures:
    """AdamW over ten updates, in fp32 and in bf16 without masters."""
    figures: Figures = {}
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        ends = []
        for place in (device, CPU):
            start = torch.linspace(-1, 1, 4099).to(place, dtype)
            parameter = torch.nn.Parameter(start)
            stepper = VectorAdamW([parameter], lr=1e-2, weight_decay=0.1)
            stepper.roundings = {
                parameter.untyped_storage().data_ptr(): Stream(1, "round", "w"),
            }
            for number in range(10):
                slope = torch.linspace(-1, 1, 4099).add_(number).sin_()
                parameter.grad = slope.to(place, dtype)
                stepper.step()
            ends.append([parameter.detach().float().cpu()])
        figures[f"{str(dtype).removeprefix('torch.')}_error"] = _close(*ends, limit=limit)
    return figures


def _detached(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Results and gradients on the CPU.

    Raises:
        AssertionError: a gradient is missing.
    """
    found = [each.detach().cpu() for each in tensors if each is not None]
    assert len(found) == len(tensors), "a gradient is missing"
    return found


def _close(found: list[torch.Tensor], expected: list[torch.Tensor], *, limit: float) -> float:
    """The largest error relative to the norm of what is expected."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        assert bool(torch.isfinite(a).all()), "not finite"
        worst = max(worst, float((a.double() - b.double()).norm() / b.double().norm()))
    assert worst <= limit, f"off by {worst:.2g}, more than {limit:g}"
    return worst
