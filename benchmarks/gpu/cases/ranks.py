"""Stage E: two ranks share one device through gloo: streams, tensor parallelism, offload."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.case import Case, CaseSkippedError, Figures, Sizes
from benchmarks.gpu.runs import (
    METHODS,
    STEPS,
    SmallRun,
    architecture,
    batches,
    be_deterministic,
    join,
    run_config,
)
from relora_ds.errors import ConfigError
from relora_ds.parallel.topology import Topology

_GLOO = {"RELORA_DS_BACKEND": "gloo"}
_DELAY_CYCLES = 200_000_000  # about a tenth of a second on a GPU
# what a library says of a collective that gloo does not have for tensors on a GPU
_UNSUPPORTED = ("does not support", "not supported", "unsupported", "no backend type")


def cases(tiny: bool) -> list[Case]:
    """All of the stage."""
    found = []
    for stage in (1, 2, 3):
        for method in ("relora", "switchlora", *(() if tiny or stage < 3 else ("galore",))):
            arguments = {"method": method, "stage": stage}
            worth = 40 if stage == 3 else 10
            found.append(_case(f"{method} zero{stage} overlap", overlap, arguments, worth))
    for method in ("relora", "switchlora", "sltrain"):
        found.append(_case(f"{method} tensor 2", tensor_parallel, {"method": method}, 12))
    offload: dict[str, dict[str, Any]] = {
        "optimizer": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "parameters": {
            "stage": 3,
            "offload_param": {"device": "cpu"},
            "offload_optimizer": {"device": "cpu"},
        },
    }
    for name, zero in offload.items():
        for size in (1, 2):
            arguments = {"zero": zero, "tensor": size}
            found.append(_case(f"offload {name} tensor {size}", offloaded, arguments, 12))
    return found


def _case(name: str, function: Any, arguments: dict[str, Any], value: float) -> Case:
    return Case("E", name, function, arguments, 12, value, limit_s=90, ranks=2, environment=_GLOO)


def _join(config: Any) -> Topology:
    topology = join(config)
    backend = torch.distributed.get_backend()
    if "nccl" in backend:
        raise CaseSkippedError(f"{backend} refuses two ranks on one device")
    return topology


def _losses(
    config: Any, topology: Topology, zero: dict[str, Any], model: Any, delay: bool = False
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and final weights; before every edit of weights the current stream may be delayed."""
    tokens = batches(config, model.vocab_size, STEPS)
    try:
        run = SmallRun(config, topology, zero, model)
        losses = []
        for step, each in enumerate(tokens):
            for hook, number in ((run.before_step, step), (run.after_step, step + 1)):
                if hook == run.after_step:
                    losses.append(float(run.train_step(step, each)))
                if delay and topology.device.type == "cuda":
                    torch.cuda._sleep(_DELAY_CYCLES)
                hook(number)
        weights = run.weights()
        run.destroy()
    except ConfigError as reason:
        raise CaseSkippedError(f"refused: {reason}") from None
    except RuntimeError as error:  # gloo's own, and torch's where it has no kernel
        text = str(error)
        if topology.device.type == "cuda" and any(word in text.lower() for word in _UNSUPPORTED):
            raise CaseSkippedError(f"gloo: {text.splitlines()[0]}") from None
        raise
    return losses, weights


def overlap(device: torch.device, sizes: Sizes, method: str, stage: int) -> Figures:
    """With `overlap_comm` and a late stream the same bits as without: nothing is read too early."""
    be_deterministic()
    # with overlap stage 1 adds up the norm in another order, which nothing sees without clipping
    config, model = run_config(METHODS[method], optimizer={"clip": 0}), architecture(sizes)
    topology = _join(config)
    settings: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 10_000}
    if stage == 3:
        settings["stage3_param_persistence_threshold"] = 0
    plain = _losses(config, topology, settings | {"overlap_comm": False}, model)
    late = _losses(config, topology, settings | {"overlap_comm": True}, model, delay=True)
    assert late[0] == plain[0], f"losses {late[0]} differ from {plain[0]}"
    same = all(torch.equal(a, b) for a, b in zip(late[1], plain[1], strict=True))
    assert same, "weights differ: something was read before it was written"
    return {"last_loss": plain[0][-1]}


def tensor_parallel(device: torch.device, sizes: Sizes, method: str) -> Figures:
    """One copy of the model on two ranks trains, and both ranks see the same loss."""
    config = run_config(METHODS[method], parallel={"tensor": 2})
    topology = _join(config)
    losses, _ = _losses(config, topology, {"stage": 1}, architecture(sizes))
    return _agreed(losses, device)


def offloaded(device: torch.device, sizes: Sizes, zero: dict[str, Any], tensor: int) -> Figures:
    """States or weights on the host: it trains, or is refused in words."""
    if device.type != "cuda":
        raise CaseSkippedError("nothing is off a device that is the host")
    config = run_config(
        METHODS["relora"],
        precision="bf16",
        parallel={"tensor": tensor},
        optimizer={"name": "cpu_adam"},
    )
    topology = _join(config)
    losses, _ = _losses(config, topology, zero, architecture(sizes))
    return _agreed(losses, device) if tensor == 2 else {"last_loss": losses[-1]}


def _agreed(losses: list[float], device: torch.device) -> Figures:
    mine = torch.tensor(losses, dtype=torch.float64)
    assert bool(torch.isfinite(mine).all()), f"losses {losses}"
    first = mine.clone()
    torch.distributed.broadcast(first, 0)
    assert torch.equal(mine, first), "the ranks see different losses"
    return {"last_loss": losses[-1]}
