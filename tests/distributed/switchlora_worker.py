"""SwitchLoRA on the engine at every stage against the plain reference, one start.

Run by `test_switchlora.py` on two ranks; rank 0 writes the figures.
"""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from relora_ds.accounting.recorder import recorder
from relora_ds.checkpoint.restore import load_side_tensors, side_slices, side_tensors
from relora_ds.config.methods.switchlora import SwitchLoRAConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import DesyncError
from relora_ds.methods.adapter import AdapterLinear
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import Phase
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.parallel.topology import Topology
from tests.distributed import relora_worker as common
from tests.distributed.reference import PlainAdapter
from tests.distributed.switchlora_reference import PlainSwitchLoRA

STAGES = (0, 1, 2, 3)
STEPS, RANK, CLIP, EPS, DECAY = 204, 5, 0.05, 1e-3, 0.1
LRS = {"dense": 1e-3, "adapter": 3e-3}
BREAK_AT, AFTER, CHECKED = 25, 12, 20


def run_config(stage: int, precision: str, **method: Any) -> RunConfig:
    values = common.run_config(stage, common.RESETS["zero"], precision).model_dump(mode="json")
    values["method"] = {
        "name": "switchlora",
        "rank": RANK,
        "interval": 10,
        "descent_rate": 1.0,
        **method,
    }
    values["train"]["steps"] = STEPS
    values["optimizer"] |= {"clip": CLIP, "eps": EPS, "weight_decay": DECAY}
    return RunConfig.model_validate_json(json.dumps(values))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    shape = (common.BATCH, common.SEQUENCE + 1)
    return [torch.randint(0, common.VOCAB, shape, generator=generator) for _ in range(STEPS)]


def reference() -> tuple[dict[str, torch.Tensor], PlainSwitchLoRA, list[float]]:
    config = run_config(0, "fp32")
    assert isinstance(config.method, SwitchLoRAConfig)
    scale = config.method.scale
    model = Llama(common.ARCHITECTURE, lambda spec: PlainAdapter(spec, RANK, scale))
    draw = InitialWeights(common.ARCHITECTURE, config.train.seed)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data.copy_(draw(name, tuple(parameter.shape)))
    plain = PlainSwitchLoRA(model, config.method, 42, STEPS, LRS, CLIP, EPS, DECAY)
    losses = plain.train(batches())
    return {n: p.detach() for n, p in model.named_parameters()}, plain, losses


def build(
    stage: int, config: RunConfig, topology: Topology, whole_copies: bool = True
) -> tuple[Phase, TrainEngine]:
    """Attached; `whole_copies` lets stage 3 keep whole copies of parameters as small as these."""
    zero = {} if whole_copies or stage < 3 else {"stage3_param_persistence_threshold": 0}
    phase, engine = common.build(stage, config, topology, **zero)
    with torch.no_grad():
        phase.method.attach(engine.state, engine.model)
    return phase, engine


def train(
    phase: Phase, engine: TrainEngine, topology: Topology, first: int = 0, last: int = STEPS
) -> dict[str, Any]:
    """Updates first + 1 to last; what the tests assert on."""
    found: dict[str, Any] = {"losses": [], "norms": [], "drifts": [], "moved": 0, "event_bytes": 0}
    for step, tokens in enumerate(batches()[first:last], start=first):
        engine.set_learning_rates(LRS)
        recorder.begin_step()
        with torch.no_grad(), recorder.phase("event"):
            assert phase.method.before_step(engine.state, engine.model, step) is None
        found["event_bytes"] += recorder.step_bytes().payload
        frozen = _frozen(engine) if step < CHECKED else []
        loss, norm = engine.train_step(common.own_share(tokens, topology))
        if step < CHECKED:
            pairs = zip(frozen, _frozen(engine, step), strict=True)
            found["moved"] += sum(not torch.equal(old, new) for old, new in pairs)
        found["losses"].append(float(distributed.mean_over_ranks(loss.clone())))
        found["norms"].append(float(norm))
        if step % 50 == 1:
            with torch.no_grad():
                found["figures"] = phase.method.figures(engine.state, engine.model)
            found["drifts"] += [v for k, v in found["figures"].items() if k.endswith("drift")]
    return found


def _frozen(engine: TrainEngine, done: int | None = None) -> list[torch.Tensor]:
    """Copies of all vectors that the update after `done` updates leaves alone."""
    done = engine.completed_steps() if done is None else done
    vectors = []
    for parameter, clock in engine.clocks.items():
        index = (~clock.live(done)).nonzero().flatten()
        vectors.append(common.whole(engine, parameter).index_select(clock.axis, index).clone())
    return vectors


def effective_weights(engine: TrainEngine) -> list[torch.Tensor]:
    """W + s B A of every projection in float64, from the authoritative W."""
    found = []
    for layer in projection_layers(engine.model).values():
        assert isinstance(layer, AdapterLinear)
        eye = torch.eye(layer.spec.in_features)
        weight = engine.state.weight_times(layer.weight, eye).double()
        lora_a, lora_b = (w.double() for w in engine.state.gather([layer.lora_A, layer.lora_B]))
        found.append(weight + layer.merge_scale() * lora_b @ lora_a)
    return found


@torch.no_grad()
def many_events(phase: Phase, engine: TrainEngine) -> dict[str, Any]:
    """Switches without training: each event's change of the function, and what adds up."""
    start = effective_weights(engine)
    largest, events = 0.0, 0
    before = start
    for step in range(engine.completed_steps(), engine.completed_steps() + 40):
        for clock in engine.clocks.values():  # as if the freeze were over
            clock.freeze(0, torch.arange(clock.count))
        phase.method.before_step(engine.state, engine.model, step)
        after = effective_weights(engine)
        pairs = zip(after, before, strict=True)
        largest = max([largest, *(float((a - b).norm() / b.norm()) for a, b in pairs)])
        before, events = after, events + 1
    pairs = zip(before, start, strict=True)
    total = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return {"largest": largest, "total": total, "events": events}


def digest(phase: Phase, engine: TrainEngine, topology: Topology) -> dict[str, str]:
    """One bit changed on rank 1 in everything that a switch edits: what is reported."""
    names = {n: p for n, p in engine.model.named_parameters() if "layers.1.mlp.up_proj" in n}
    targets = {n: engine.layout.working(p)[1] for n, p in names.items()}
    for name, parameter in names.items():
        if parameter in engine.bases:
            targets[f"{name} (low)"] = engine.bases[parameter].tensors()["low"]
        if parameter in engine.clocks:
            targets[f"{name} (born)"] = engine.clocks[parameter].tensors()["born"]
    own = phase.method.replicas()
    targets |= {name: value for name, value in own.items() if "layers.1.mlp.up_proj" in name}
    found = {}
    for name, tensor in targets.items():
        bits = tensor.view(-1).view(torch.int16)
        bits[3] ^= topology.dp_rank == 1
        try:
            engine.check_replicas(phase.method.replicas(), "switch")
        except DesyncError as error:
            found[name] = str(error)
        bits[3] ^= topology.dp_rank == 1
    engine.check_replicas(phase.method.replicas())
    assert found.keys() == targets.keys(), targets.keys() - found.keys()
    return found


def resumed(stage: int, config: RunConfig, topology: Topology, directory: Path) -> dict[str, Any]:
    """An interrupted run against one that goes on, with frozen vectors pending at the break."""
    phase, engine = build(stage, config, topology, whole_copies=False)
    train(phase, engine, topology, 0, BREAK_AT)
    pending = sum(int((~clock.live(BREAK_AT)).sum()) for clock in engine.clocks.values())
    engine.save(str(directory), "tag")
    side = {
        name: tensor.clone()
        for name, tensor in (side_tensors(engine) | side_slices(engine)).items()
    }
    with torch.no_grad():
        method = deepcopy(distributed.broadcast_object(phase.method.state_dict()))
    expected = train(phase, engine, topology, BREAK_AT, BREAK_AT + AFTER)
    weights = [common.whole(engine, p).clone() for p in engine.model.parameters()]
    engine.destroy()
    phase, engine = build(stage, config, topology, whole_copies=False)
    engine.load(str(directory), "tag")
    load_side_tensors(engine, side)
    phase.method.load_state_dict(method)
    distributed.barrier()
    found = train(phase, engine, topology, BREAK_AT, BREAK_AT + AFTER)
    again = [common.whole(engine, p) for p in engine.model.parameters()]
    engine.destroy()
    return {
        "pending": pending,
        "same_losses": found["losses"] == expected["losses"],
        "same_weights": all(torch.equal(a, b) for a, b in zip(weights, again, strict=True)),
    }


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    figures: dict[str, Any] = {}
    expected, plain, losses = reference()
    with recorder:
        for stage in STAGES:
            phase, engine = build(stage, run_config(stage, "fp32"), topology)
            found = train(phase, engine, topology)
            found["difference"] = common.difference(engine, expected)
            found["replicas"] = common.replicas_differ(engine)
            figures[f"fp32/{stage}"] = found
            engine.destroy()
            phase, engine = build(stage, run_config(stage, "bf16", candidates="device"), topology)
            found = train(phase, engine, topology, 0, 20)
            found["replicas"] = common.replicas_differ(engine)
            found["digest"] = digest(phase, engine, topology)
            found["untrained"] = many_events(phase, engine)
            figures[f"bf16/{stage}"] = found
            engine.destroy()
            config = run_config(stage, "fp32" if stage == 1 else "bf16")
            directory = output.parent / f"resume_{stage}"
            figures[f"resume/{stage}"] = resumed(stage, config, topology, directory)
    figures["reference"] = {"losses": losses, "norms": plain.norms, "switched": plain.switched}
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
