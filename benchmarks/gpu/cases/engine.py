"""Stage D: every method at every ZeRO stage, on one rank: run again, resumed, and compared."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.case import Case, Figures, Sizes
from benchmarks.gpu.runs import (
    METHODS,
    STEPS,
    SmallRun,
    architecture,
    batches,
    be_deterministic,
    join,
    resumed,
    run_config,
)

_BREAK = STEPS // 2
_EVENTFUL = ("galore", "relora", "switchlora")
_STAGES = (0, 1, 2, 3)
# another stage is the same run up to the order of sums
_ACROSS_STAGES = {"fp32": 2e-5, "bf16": 2e-2}


def cases(tiny: bool) -> list[Case]:
    """One case per method and precision, of all stages: a process that uses a GPU starts slowly."""
    found = []
    for method in METHODS:
        for precision in ("fp32", "bf16"):
            arguments = {"method": method, "precision": precision}
            name = f"{method} {precision}"
            worth = 40 if method in _EVENTFUL else 20
            case = Case("D", name, stages, arguments, expected_s=15, value=worth, limit_s=120)
            found.append(case)
    found.append(Case("D", "without determinism", rerun, expected_s=8, value=5))
    return found


def stages(device: torch.device, sizes: Sizes, method: str, precision: str) -> Figures:
    """Twelve steps, again, and from a checkpoint of the sixth: bit-equal; stages agree."""
    be_deterministic()
    config = run_config(METHODS[method], precision=precision)
    topology, model = join(config), architecture(sizes)
    tokens = batches(config, model.vocab_size, STEPS)
    losses_by_stage: dict[int, list[float]] = {}
    events = 0
    for stage in _chosen(sizes, method, precision):
        where = f"stage {stage}"
        zero = {"stage": stage}
        run = SmallRun(config, topology, zero, model)
        first, _ = run.train(tokens[:_BREAK])
        with tempfile.TemporaryDirectory() as folder:
            saved = run.save(Path(folder))
            rest, events = run.train(tokens[_BREAK:], _BREAK)
            weights = run.weights()
            run.destroy()
            again = resumed(config, topology, zero, model, saved)
            found, _ = again.train(tokens[_BREAK:], _BREAK)
            _check_same(rest, found, weights, again.weights(), f"resumed, {where}")
            again.destroy()
        losses_by_stage[stage] = [*first, *rest]
        repeat = SmallRun(config, topology, zero, model)
        found, _ = repeat.train(tokens)
        _check_same([*first, *rest], found, weights, repeat.weights(), f"run again, {where}")
        repeat.destroy()
        assert events > 0 or method not in _EVENTFUL, f"{where}: no event happened"
    return {"events": events, **_spread(losses_by_stage, precision)}


def _chosen(sizes: Sizes, method: str, precision: str) -> list[int]:
    """All stages; tiny runs share them out between methods and precisions."""
    if not sizes.tiny:
        return list(_STAGES)
    turn = list(METHODS).index(method) % len(_STAGES)
    shares = [_STAGES[(turn + more) % len(_STAGES)] for more in (0, 1, 3)]
    if precision == "bf16":
        return shares[:1]
    return sorted(shares[1:]) if method in _EVENTFUL else shares[1:2]


def _check_same(
    expected: list[float],
    found: list[float],
    weights: list[torch.Tensor],
    again: list[torch.Tensor],
    what: str,
) -> None:
    assert all(loss == loss for loss in expected), f"{what}: a loss is not a number"
    for number, pair in enumerate(zip(expected, found, strict=True)):
        assert pair[0] == pair[1], f"{what}: loss {number} is {pair[1]!r}, not {pair[0]!r}"
    for number, pair in enumerate(zip(weights, again, strict=True)):
        assert torch.equal(*pair), f"{what}: weight {number} differs"


def _spread(losses: dict[int, list[float]], precision: str) -> Figures:
    """How far the stages' losses are apart, and the last of the first stage's."""
    (lowest, reference), *others = losses.items()
    worst = 0.0
    for stage, found in others:
        pairs = zip(reference, found, strict=True)
        apart = max(abs(a - b) / abs(a) for a, b in pairs)
        limit = _ACROSS_STAGES[precision]
        assert apart <= limit, f"stages {lowest} and {stage} are {apart:.2g} apart"
        worst = max(worst, apart)
    return {"first_loss": reference[0], "last_loss": reference[-1], "stages_apart": worst}


def rerun(device: torch.device, sizes: Sizes) -> Figures:
    """Without `train.deterministic`: how far two runs are apart. Reported, never a failure."""
    config = run_config(METHODS["relora"], precision="bf16")
    topology, model = join(config), architecture(sizes)
    tokens = batches(config, model.vocab_size, STEPS)
    losses = []
    for _ in range(2):
        run = SmallRun(config, topology, {"stage": 1}, model)
        losses.append(run.train(tokens)[0])
        run.destroy()
    pairs = zip(*losses, strict=True)
    return {"apart": max(abs(a - b) / abs(a) for a, b in pairs)}
