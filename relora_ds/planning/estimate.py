"""What one phase of a run takes up, moves and needs in time on a cluster. Allocates nothing.

Memory and bytes are the closed forms of `accounting.memory.model`, `accounting.zero_traffic` and
`accounting.tp_traffic`, for the process that holds most. Time is a model: the operations of
`accounting.flops` at a share of the peak, and latency plus bytes over bandwidth for communication.
What tensor-parallel processes exchange stands between one block and the next and overlaps with
nothing; the true step lies between the larger of the other two, if they overlap, and their sum.
Composing weights (SLTrain) and events are not among those operations.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from relora_ds.accounting.collectives import Wire, wire_by_link
from relora_ds.accounting.flops import ParameterCounts, flops_per_token, parameter_counts
from relora_ds.accounting.footprints import footprints
from relora_ds.accounting.matrix_traffic import MatrixTraffic, most_matrix_traffic
from relora_ds.accounting.memory.model import StoragePlan, state_bytes
from relora_ds.accounting.memory.use import MemoryUse
from relora_ds.accounting.recorder import Volumes
from relora_ds.accounting.tp_traffic import GroupWork, shares_by_rank, tensor_volumes
from relora_ds.accounting.zero3_gathers import Replay, gathered
from relora_ds.accounting.zero_traffic import (
    HPZ_GROUP,
    Payloads,
    bytes_of,
    expected_payloads,
)
from relora_ds.config.load import LoadedRun
from relora_ds.methods.formulation.choice import update_of
from relora_ds.methods.interface import (
    MemoryShare,
    matrix_rules,
    optimizer_groups,
    projection_layers,
)
from relora_ds.methods.registry import Phase
from relora_ds.numerics.dtypes import DTYPES
from relora_ds.parallel.footprint import UpdateSize
from relora_ds.parallel.shape import shard_of
from relora_ds.parallel.topology import part_of_model
from relora_ds.parallel.zero import ZeroSettings
from relora_ds.planning.memory_report import largest_part, memory_of_part, storage_plan
from relora_ds.planning.results import Cluster, Estimate, GpuMemory, Seconds, StepTraffic

# DeepSpeed flattens so many elements at a time at stage 0
_STAGE_0_BUCKET = 500_000_000


class PhaseEstimator:
    """Estimates of one phase.

    Args:
        loaded: the run, with the tensor-parallel size to estimate.
        phase: one of its phases.
        cluster: where it is to run.
        copies: data-parallel size.
    """

    def __init__(self, loaded: LoadedRun, phase: Phase, cluster: Cluster, copies: int) -> None:
        config, train = loaded.config, loaded.config.train
        self._config, self._method = config, phase.method
        self._cluster, self._copies = cluster, copies
        self._tp = part_of_model(config.parallel)
        self._model = largest_part(loaded.architecture, self._method, train, self._tp)
        groups = optimizer_groups(self._method, config.optimizer, self._model)
        self._groups = [group.parameters for group in groups]
        trained = [parameter for group in self._groups for parameter in group]
        self._trained = sum(p.numel() for p in trained)
        self._alike = [p for p in trained if self._tp.size > 1 and shard_of(p) is None]
        self._rules = matrix_rules(self._method, config.optimizer, self._model)
        self._edited = sum(p.numel() for p in self._method.edited_weights(self._model))

    def counts(self) -> ParameterCounts:
        """Parameters of the phase's whole model."""
        return parameter_counts(self._model)

    def estimate(self, zero: ZeroSettings) -> Estimate:
        """Memory, bytes and time with one DeepSpeed configuration."""
        shares = shares_by_rank(self._model, self._groups, zero.stage, self._copies)
        replay = self._gathers(zero)
        memory = self._memory(zero, replay.live, max(shares))
        total = memory.total
        per_sequence, room = self._per_sequence(zero), self._room()
        largest = self._config.train.micro_batch_size + math.floor((room - total) / per_sequence)
        volumes = self._tensor_volumes(zero, max(shares))
        moved = self._traffic(self._payloads(zero, replay), volumes)
        alike = state_bytes(self._storage(zero), self._alike, self._rules)
        return Estimate(
            memory=memory,
            bytes_per_gpu=total,
            states_held_alike=round(alike),
            host_bytes_per_node=self._parked().host * self._parts_per_node(),
            fits=total <= room,
            largest_micro_batch=max(0, largest),
            traffic=moved,
            seconds=self._seconds(zero, moved, replay.calls, volumes),
        )

    def _gpu_bytes(self) -> int:
        return round(self._cluster.gpu_memory)

    def _update(self, stage: int) -> UpdateSize:
        layers, train = projection_layers(self._model).values(), self._config.train
        return update_of(layers, train, stage, self._copies, "cuda", self._gpu_bytes())

    def _working(self) -> int:
        return DTYPES[self._config.train.precision].itemsize

    def _room(self) -> float:
        return self._cluster.gpu_memory * (1 - self._cluster.reserve)

    def _parked(self) -> MemoryShare:
        """Bytes that the method keeps beside the model."""
        share, size = self._method.memory_share(self._model), self._working()
        return MemoryShare(share.device * size, share.host * size)

    def _parts_per_node(self) -> int:
        """Different parts of the model on one node: each has host memory of its own."""
        return min(self._tp.size, self._cluster.gpus_per_node)

    def _gathers(self, zero: ZeroSettings) -> Replay:
        """What stage 3 gathers of the weights; nothing at other stages."""
        if zero.stage < 3 or self._copies == 1:
            return Replay({}, 0, 0)
        return gathered(self._model, zero.gathering, self._copies, zero.accumulation, self._tp.size)

    def _storage(self, zero: ZeroSettings) -> StoragePlan:
        device = torch.device("cuda")
        return storage_plan(self._config, zero.stage, self._copies, device, self._gpu_bytes())

    def _form(self, zero: ZeroSettings, micro: int) -> MemoryUse:
        train = self._config.train.model_copy(update={"micro_batch_size": micro})
        config = self._config.model_copy(update={"train": train})
        return memory_of_part(self._model, self._method, config, self._storage(zero))

    def _memory(self, zero: ZeroSettings, live: int, share: int) -> GpuMemory:
        """Bytes per GPU.

        Args:
            live: most elements that stage 3 makes whole at once.
            share: elements of gradient shares that are joined for one collective.
        """
        form = self._form(zero, self._config.train.micro_batch_size)
        residual = self._storage(zero).beside_edited * self._edited
        residual //= self._copies if zero.stage == 3 else 1
        bucket = min(zero.reduce_bucket if zero.stage else _STAGE_0_BUCKET, self._trained)
        buffers = bucket * self._working() * (2 if zero.overlaps else 1)
        near = zero.gathering.hpz
        held = sum(p.numel() for p in self._model.parameters()) // near if near > 1 else 0
        # shares of gradients are joined for one collective, if any outlive the backward pass
        within = self._config.train.per_layer_update
        shares = 0 if within else share * self._working()
        # an event is over before there are gradients
        event = self._method.event_bytes(self._model, zero.accumulation)
        transient = (form.transient or 0) + max(0, event - form.gradients)
        return GpuMemory(
            **form.as_dict() | {"weights": form.weights - residual, "transient": transient},
            residual=residual,
            gathered=(live + held) * self._working(),
            parked=self._parked().device,
            buffers=(buffers if self._copies > 1 and not within else 0) + shares,
        )

    def _per_sequence(self, zero: ZeroSettings) -> int:
        one, two = (self._form(zero, micro).activations for micro in (1, 2))
        return two - one

    def _payloads(self, zero: ZeroSettings, replay: Replay) -> Payloads:
        groups, copies, matrices = self._groups, self._copies, self._matrices(zero)
        return expected_payloads(
            self._model, groups, zero, copies, replay=replay, matrices=matrices
        )

    def _matrices(self, zero: ZeroSettings) -> MatrixTraffic:
        sizes = self._copies, self._tp.size
        return most_matrix_traffic(self._model, self._groups, self._rules, zero, sizes)

    def _tensor_volumes(self, zero: ZeroSettings, share: int) -> Volumes:
        if self._tp.size == 1:
            return {}
        update, groups = self._update(zero.stage), len(self._groups)
        work = GroupWork(self._tp.size, update, share, groups, self._matrices(zero).sharded)
        return tensor_volumes(self._model, zero, work)

    def _traffic(self, payloads: Payloads, volumes: Volumes) -> StepTraffic:
        """Bytes per step and GPU.

        Args:
            payloads: between copies of the model.
            volumes: within a copy.
        """
        across = {kind: volume.payload for kind, volume in volumes.items()}
        data, tensor = self._by_link(payloads), self._by_link(across)
        gradients = [
            size
            for kind, size in payloads.items()
            if kind.phase == "backward" and kind.operation != "all_gather"
        ]
        payload, wire = bytes_of(payloads, across)
        return StepTraffic(
            gradient_payload=sum(gradients),
            payload=payload,
            wire=wire,
            within_node=data.near + tensor.near,
            between_nodes=data.far + tensor.far,
            tensor_payload=sum(across.values()),
            tensor_within_node=tensor.near,
            tensor_between_nodes=tensor.far,
        )

    def _by_link(self, payloads: Payloads) -> Wire:
        """Wire bytes; ranks that share a model are neighbours, copies lie that far apart."""
        near = far = 0.0
        node, size = self._cluster.gpus_per_node, self._tp.size
        for kind, payload in payloads.items():
            if kind.group == HPZ_GROUP:  # its copies lie within nodes
                per_node = kind.size
            elif kind.group == "tp":  # a size that does not divide a node straddles two
                per_node = size if self._cluster.gpus <= node else math.gcd(size, node)
            else:
                per_node = max(1, node // size)
            link = wire_by_link(kind.operation, payload, kind.size, per_node)
            near, far = near + link.near, far + link.far
        return Wire(near, far)

    def _seconds(
        self, zero: ZeroSettings, moved: StepTraffic, gathers: int, volumes: Volumes
    ) -> Seconds:
        cluster, compute = self._cluster, self._compute_seconds(zero.stage)
        bucket = zero.reduce_bucket * self._working()
        calls = gathers + math.ceil(moved.gradient_payload / bucket) + len(self._groups)

        def over(near: float, far: float, calls: int, size: int) -> float:
            """Seconds of collectives on so many processes."""
            waits = calls * cluster.latency * math.ceil(math.log2(size))
            return waits + near / cluster.node_bandwidth + far / cluster.bandwidth

        near, far = moved.tensor_within_node, moved.tensor_between_nodes
        inner = sum(volume.calls for volume in volumes.values())
        tensor = over(near, far, inner, self._tp.size)
        rest = moved.within_node - near, moved.between_nodes - far
        communication = over(*rest, calls, self._copies)
        return Seconds(
            compute=compute,
            communication=communication,
            tensor=tensor,
            overlapped=tensor + max(compute, communication),
            serial=tensor + compute + communication,
        )

    def _compute_seconds(self, stage: int) -> float:
        train, cluster = self._config.train, self._cluster
        tokens = train.global_batch_size * train.seq_length / cluster.gpus
        # every rank multiplies with what every rank holds whole
        again = (self._tp.size - 1) * _held_alike(self._model, self._update(stage))
        operations = (flops_per_token(self._model, train.seq_length) + 6.0 * again) * tokens
        if train.activation_checkpointing:
            operations += (_forward_flops(self._model) + 2.0 * again) * tokens
        return operations / (cluster.peak_flops * cluster.efficiency)


def _held_alike(model: nn.Module, size: UpdateSize) -> int:
    """Elements of matrices that are whole on every tensor-parallel rank and read activations.

    A layer that makes a whole weight of trained parameters composes its own part of it instead.
    """
    return sum(
        parameter.numel()
        for layer, cost in footprints(model, size).items()
        if not (cost.scratch_bytes and all(p.requires_grad for p in layer.parameters()))
        for name, parameter in layer.named_parameters()
        if name != "bias" and parameter.requires_grad and shard_of(parameter) is None
    )


def _forward_flops(model: nn.Module) -> float:
    """What recomputing the layers adds per token: two per element of a projection."""
    kinds = parameter_counts(model).by_kind
    return 2.0 * sum(sum(kinds.get(kind, (0, 0))) for kind in ("attention", "mlp"))
