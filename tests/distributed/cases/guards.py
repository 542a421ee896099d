"""Steps, weights and places that are not to be believed, on two ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from relora_ds.checkpoint.format.record import GuardState
from relora_ds.config.sections import GuardsConfig
from relora_ds.errors import DesyncError
from relora_ds.parallel.topology import Topology
from relora_ds.train.guards.agreement import Agreement, Place
from relora_ds.train.guards.steps import StepGuard
from tests.harness.build import STAGES, Training, batches, changed, run_config
from tests.harness.runs import EVENTFUL

RATES = {"dense": 1e-2, "adapter": 2e-2}
BAD, STEPS = 3, 6
METHODS = (("relora", "fp32"), ("relora", "bf16"), ("switchlora", "bf16"))


@contextmanager
def poisoned(run: Training, active: bool) -> Iterator[None]:
    """The model's loss is NaN inside, on this rank alone."""

    def poison(module: nn.Module, tokens: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * torch.nan if active else loss

    handle = run.engine.model.register_forward_hook(poison)
    try:
        yield
    finally:
        handle.remove()


def begin(topology: Topology, method: str, precision: str, stage: int) -> Training:
    """A run in which something happens to the method's state around the bad step."""
    config = run_config(EVENTFUL[method], train={"precision": precision})
    return Training(changed(config, "train", steps=10), topology, {"stage": stage})


def train(run: Training, guard: StepGuard | None) -> list[float]:
    """Six updates; the bad one is skipped by a guard, or never seen where there is none."""
    losses = []
    for step, tokens in enumerate(batches(STEPS)):
        run.set_rates(step, RATES)
        run.before_step(step)
        if guard is not None:
            with poisoned(run, active=step == BAD and run.topology.rank == 1):
                loss, _ = run.engine.train_step(run.own_share(tokens), guard.admit(step))
            losses.append(float(loss))
        elif step != BAD:
            losses.append(float(run.train_step(run.own_share(tokens))[0]))
        run.after_step(step + 1)
    return losses


def state(run: Training) -> dict[str, torch.Tensor]:
    """All that an update changes: masters, moments, frozen weights and clocks of this rank."""
    found = {"updates": torch.tensor(run.engine.completed_steps())}
    layout = run.engine.layout
    for name, parameter in run.named.items():
        found[name] = layout.working(parameter)[1].clone()
        if parameter in layout.placements:
            found[f"{name} master"] = layout.placements[parameter].master().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                moment = layout.optimizer_state(parameter, key)
                if moment is not None:
                    found[f"{name} {key}"] = moment.clone()
        if parameter in run.engine.bases:
            for key, tensor in run.engine.bases[parameter].tensors().items():
                found[f"{name} {key}"] = tensor.clone()
        if parameter in run.engine.clocks:
            for key, tensor in run.engine.clocks[parameter].tensors().items():
                found[f"{name} {key}"] = tensor.clone()
    return found


def skipped(topology: Topology) -> dict[str, Any]:
    """What a step with a NaN on rank 1 leaves behind under `skip`, at every stage."""
    found: dict[str, Any] = {}
    for method, precision in METHODS:
        for stage in STAGES:
            noted: list[Any] = []
            config = GuardsConfig(non_finite="skip")
            guard = StepGuard(
                config, GuardState(), lambda at, act, why, to=noted: to.append((at, act))
            )
            run = begin(topology, method, precision, stage)
            losses = train(run, guard)
            after = state(run)
            run.destroy()
            run = begin(topology, method, precision, stage)
            expected = train(run, None)
            never = state(run)
            run.destroy()
            del losses[BAD]
            differing = [name for name in never if not torch.equal(after[name], never[name])]
            found[f"{method}/{precision}/{stage}"] = {
                "differing": differing,
                "losses": losses == expected,
                "noted": noted,
                "remembered": guard.state().skipped_steps,
            }
    return found


def poisoned_weight(topology: Topology) -> dict[str, Any]:
    """What the check of weights says of one element on rank 1, at every stage."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        run = begin(topology, "relora", "bf16", stage)
        train(run, None)
        before = run.engine.non_finite()
        layer = run.layers[0]
        if topology.rank == 1:
            _, working = run.engine.layout.working(layer.weight)
            working[0] = torch.inf
        found[str(stage)] = before, run.engine.non_finite(), f"{layer.spec.name}.weight"
        run.destroy()
    return found


def places(topology: Topology) -> dict[str, Any]:
    """What meetings of ranks at different places end with."""
    agreement = Agreement()
    here = Place("end of step", 7, "relora")
    found: dict[str, Any] = {
        "nobody": agreement.meet(here),
        "one": agreement.meet(here, stop=topology.rank == 1),
    }
    others = {
        "step": Place("end of step", 8, "relora"),
        "event": Place("merge", 7, "relora"),
        "state": Place("end of step", 7, "relora", "0badcafe"),
    }
    for name, other in others.items():
        try:
            agreement.meet(other if topology.rank == 1 else here)
            found[name] = ""
        except DesyncError as error:
            found[name] = str(error)
    later = Agreement(every=2, later=True)
    wish = [
        later.ask(Place("end of step", step, "relora"), stop=topology.rank == 1 and step in (4, 7))
        for step in range(3, 9)
    ]
    found["later"] = dict(zip(range(3, 9), wish, strict=True))
    return found
