"""SwitchLoRA on the engine at every stage, beside the plain reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from relora_ds.accounting.recorder import recorder
from relora_ds.config.methods.switchlora import SwitchLoRAConfig
from relora_ds.engine import distributed
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.parallel.topology import Topology
from tests.harness.build import STAGES, TINY, Training, batches
from tests.harness.reference import PlainAdapter
from tests.harness.resume import interrupted
from tests.harness.runs import SWITCH_RATES, SWITCH_SEED, SWITCH_STEPS, start, switchlora
from tests.harness.switchlora_reference import PlainSwitchLoRA

_CHECKED = 20
"""Updates of which frozen vectors are compared before and after."""


def reference() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Parameters of the run in plain PyTorch; its losses, norms and number of switches."""
    config = switchlora("fp32")
    assert isinstance(config.method, SwitchLoRAConfig)
    scale, rank = config.method.scale, config.method.rank
    model = Llama(TINY, lambda spec: PlainAdapter(spec, rank, scale))
    draw = InitialWeights(TINY, config.train.seed)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data.copy_(draw(name, tuple(parameter.shape)))
    settings = config.optimizer
    clip, eps, decay = settings.clip, settings.eps, settings.weight_decay
    plain = PlainSwitchLoRA(model, config.method, 42, SWITCH_STEPS, SWITCH_RATES, clip, eps, decay)
    losses = plain.train(batches(SWITCH_STEPS, SWITCH_SEED))
    found = {"losses": losses, "norms": plain.norms, "switched": plain.switched}
    return {n: p.detach() for n, p in model.named_parameters()}, found


def train(run: Training, steps: int) -> dict[str, Any]:
    """The first updates; what the tests assert on."""
    found: dict[str, Any] = {"losses": [], "norms": [], "drifts": [], "moved": 0, "event_bytes": 0}
    for step, tokens in enumerate(batches(steps, SWITCH_SEED)):
        run.engine.set_learning_rates(SWITCH_RATES)
        recorder.begin_step()
        with recorder.phase("event"):
            assert run.before_step(step) is None
        found["event_bytes"] += recorder.step_bytes().payload
        frozen = _frozen(run, step) if step < _CHECKED else []
        loss, norm = run.train_step(run.own_share(tokens))
        if step < _CHECKED:
            pairs = zip(frozen, _frozen(run, step), strict=True)
            found["moved"] += sum(not torch.equal(old, new) for old, new in pairs)
        found["losses"].append(float(distributed.mean_over_ranks(loss)))
        found["norms"].append(float(norm))
        if step % 50 == 1:
            found["figures"] = run.metrics()
            found["drifts"] += [v for k, v in found["figures"].items() if k.endswith("drift")]
    found["replicas"] = run.replicas_differ()
    return found


def _frozen(run: Training, done: int) -> list[torch.Tensor]:
    """Copies of all vectors that the update after `done` updates leaves alone."""
    clocks = run.engine.clocks
    vectors = []
    for weight, clock in zip(run.gather(list(clocks)), clocks.values(), strict=True):
        index = (~clock.live(done)).nonzero().flatten()
        vectors.append(weight.index_select(clock.axis, index).clone())
    return vectors


def effective_weights(run: Training) -> list[torch.Tensor]:
    """W + s B A of every projection in float64, from the authoritative W."""
    found = []
    for layer in run.layers:
        eye = torch.eye(layer.spec.in_features)
        weight = run.engine.state.weights.times(layer.weight, eye).double()
        factors = run.engine.state.weights.gather([layer.lora_A, layer.lora_B])
        lora_a, lora_b = (w.double() for w in factors)
        found.append(weight + layer.merge_scale() * lora_b @ lora_a)
    return found


@torch.no_grad()
def many_events(run: Training) -> dict[str, Any]:
    """Switches without training: each event's change of the function, and what adds up."""
    start = effective_weights(run)
    largest, events = 0.0, 0
    before = start
    for step in range(run.engine.completed_steps(), run.engine.completed_steps() + 40):
        for clock in run.engine.clocks.values():  # as if the freeze were over
            clock.freeze(0, torch.arange(clock.count))
        run.before_step(step)
        after = effective_weights(run)
        pairs = zip(after, before, strict=True)
        largest = max([largest, *(float((a - b).norm() / b.norm()) for a, b in pairs)])
        before, events = after, events + 1
    pairs = zip(before, start, strict=True)
    total = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return {"largest": largest, "total": total, "events": events}


def digest(run: Training) -> dict[str, str]:
    """One bit changed on rank 1 in everything that a switch edits: what is reported."""
    engine, part = run.engine, "layers.1.mlp.up_proj"
    names = {name: p for name, p in run.named.items() if part in name}
    targets = {n: engine.layout.working(p)[1] for n, p in names.items()}
    for name, parameter in names.items():
        if parameter in engine.bases:
            targets[f"{name} (low)"] = engine.bases[parameter].tensors()["low"]
        if parameter in engine.clocks:
            targets[f"{name} (born)"] = engine.clocks[parameter].tensors()["born"]
    own = run.session.replicas()
    targets |= {name: value for name, value in own.items() if part in name}
    found = {}
    for name, tensor in targets.items():
        bits = tensor.view(-1).view(torch.int16)
        bits[3] ^= run.topology.dp_rank == 1
        found[name] = run.desync("switch")
        bits[3] ^= run.topology.dp_rank == 1
    run.check_replicas()
    return found


def figures(topology: Topology, directory: Path) -> dict[str, Any]:
    """Every stage: long in fp32, short in bf16 with faults and many switches, interrupted."""
    expected, plain = reference()
    found: dict[str, Any] = {"reference": plain}
    with recorder:
        for stage in STAGES:
            run = start(switchlora("fp32"), stage, topology)
            found[f"fp32/{stage}"] = train(run, SWITCH_STEPS)
            found[f"fp32/{stage}"]["difference"] = run.difference(expected)
            run.destroy()
            run = start(switchlora("bf16", candidates="device"), stage, topology)
            found[f"bf16/{stage}"] = train(run, 20) | {
                "digest": digest(run),
                "untrained": many_events(run),
            }
            run.destroy()
            config = switchlora("fp32" if stage == 1 else "bf16")
            saved = directory / f"resume_{stage}"
            found[f"resume/{stage}"] = interrupted(topology, config, stage, saved)
    return found
