"""What a run will take up, move and need in time on a cluster, and how to cut it, before a start.

Every ZeRO stage, with the tensor-parallel size that the run asks for and with every other one that
its heads and the cluster's nodes allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from relora_ds.config.load import LoadedRun, check_processes
from relora_ds.config.reading.source import read_json
from relora_ds.config.rules.tensors import (
    heads_divide_over_tensor,
    rank_divides_over_tensor,
    tensor_parallelism_is_supported,
)
from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import ParallelConfig
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.errors import ConfigError
from relora_ds.methods.registry import plan_phases
from relora_ds.parallel.tensor import LowRankPlan, TensorParallel
from relora_ds.parallel.zero import ZeroSettings
from relora_ds.planning.estimate import PhaseEstimator
from relora_ds.planning.results import Candidate, Cluster, Cut, PhasePlan, Plan


def plan(loaded: LoadedRun, cluster: Cluster, compare_sizes: bool = True) -> Plan:
    """Estimates of every phase of a run at every ZeRO stage, and how to cut the run.

    Args:
        compare_sizes: look at other tensor-parallel sizes too, and at both plans for low-rank
            factors if the run leaves the choice.

    Raises:
        ConfigError: the run does not fit the number of processes.
    """
    config, tensor = loaded.config, loaded.config.parallel.tensor
    copies, left = divmod(cluster.gpus, tensor)
    if left or (cluster.gpus > cluster.gpus_per_node and cluster.gpus % cluster.gpus_per_node):
        raise ConfigError(
            f"--gpus {cluster.gpus} must be a multiple of parallel.tensor "
            f"({tensor}) and, on several nodes, of --gpus-per-node "
            f"({cluster.gpus_per_node})"
        )
    check_processes(loaded, copies)
    asked = _name(resolve_deepspeed_config(config.deepspeed, config, copies))
    others = _tensor_sizes(loaded, cluster) if compare_sizes else ()
    cuts = {
        (size, plan): loaded.config.parallel.model_copy(
            update={"tensor": size, "low_rank_plan": plan}
        )
        for size in sorted({tensor, *others})
        for plan in _low_rank_plans(config, size, compare_sizes)
    }
    phases = {key: _phases(_cut(loaded, parallel), cluster) for key, parallel in cuts.items()}
    candidates = {key: list(_candidates(cuts[key], found)) for key, found in phases.items()}
    fitting = (each for found in candidates.values() for each in found if each.fits)
    chosen = config.parallel.low_rank_plan
    return Plan(
        cluster=cluster,
        processes=copies,
        asked=Cut(tensor, chosen, asked),
        suggested=_best(fitting),
        # the ZeRO file may be one that goes with no other size
        sizes=[_of_size(found) for found in candidates.values() if found],
        phases=phases[tensor, chosen],
    )


def _tensor_sizes(loaded: LoadedRun, cluster: Cluster) -> Iterator[int]:
    """Sizes that the run's rules allow and that keep a copy of the model within a node."""
    config = loaded.config
    together = cluster.gpus if cluster.gpus <= cluster.gpus_per_node else cluster.gpus_per_node
    for size in range(1, together + 1):
        cut = {"tensor": size, "sequence": config.parallel.sequence and size > 1}
        parallel = config.parallel.model_copy(update=cut)
        problems = [
            *rank_divides_over_tensor(config.method, parallel),
            *heads_divide_over_tensor(parallel, loaded.architecture),
            *tensor_parallelism_is_supported(parallel, config.train),
        ]
        if together % size or problems:
            continue
        try:
            check_processes(loaded, cluster.gpus // size)
        except ConfigError:
            continue  # the batch does not divide over so many copies
        yield size


def _low_rank_plans(config: RunConfig, size: int, compare: bool) -> list[LowRankPlan]:
    """The run's own plan, and whole factors where `auto` would cut them."""
    chosen, rank = config.parallel.low_rank_plan, config.method.low_rank
    cuts = chosen == "auto" and rank and TensorParallel(size=size).shards_inner(rank)
    return [chosen, "fold"] if compare and cuts else [chosen]


def _cut(loaded: LoadedRun, parallel: ParallelConfig) -> LoadedRun:
    return replace(loaded, config=loaded.config.model_copy(update={"parallel": parallel}))


def _phases(loaded: LoadedRun, cluster: Cluster) -> dict[str, PhasePlan]:
    config = loaded.config
    copies = cluster.gpus // config.parallel.tensor
    options = dict(_options(config, cluster, copies))
    found = {}
    for phase in plan_phases(config):
        estimator = PhaseEstimator(loaded, phase, cluster, copies)
        estimates = {name: estimator.estimate(option) for name, option in options.items()}
        counts = estimator.counts()
        found[phase.name] = PhasePlan(counts.trainable, counts.frozen, estimates)
    return found


def _options(
    config: RunConfig, cluster: Cluster, copies: int
) -> Iterator[tuple[str, ZeroSettings]]:
    """DeepSpeed configurations by name: the run's own file at its stage, defaults at the others."""
    own = read_json(config.deepspeed).data
    zero = own.get("zero_optimization", {})
    hpz = cluster.gpus_per_node
    for stage, per_copy in ((0, 1), (1, 1), (2, 1), (3, 1), (3, hpz)):
        if per_copy > 1 and copies <= per_copy:
            continue
        section = {**(zero if zero.get("stage", 0) == stage else {}), "stage": stage}
        if per_copy > 1:
            section["zero_hpz_partition_size"] = per_copy
        try:
            settings = resolve_deepspeed_config(
                {**own, "zero_optimization": section}, config, copies
            )
        except ConfigError:
            continue  # per-layer updates are for stage 0, candidates on the host for some, ...
        yield _name(settings), settings


def _name(zero: ZeroSettings) -> str:
    hpz = zero.gathering.hpz
    return f"{zero.stage}" + (f" hpZ {hpz}" if hpz > 1 else "")


def _candidates(parallel: ParallelConfig, phases: Mapping[str, PhasePlan]) -> Iterator[Candidate]:
    """Every stage with the worst of its phases."""
    stages = [phase.stages for phase in phases.values()]
    for name in stages[0]:
        each = [estimates[name] for estimates in stages]
        yield Candidate(
            tensor=parallel.tensor,
            low_rank_plan=parallel.low_rank_plan,
            stage=name,
            fits=all(estimate.fits for estimate in each),
            bytes_per_gpu=max(estimate.bytes_per_gpu for estimate in each),
            states=max(estimate.memory.states for estimate in each),
            states_held_alike=max(estimate.states_held_alike for estimate in each),
            largest_micro_batch=min(estimate.largest_micro_batch for estimate in each),
            seconds=max(estimate.seconds.serial for estimate in each),
        )


def _best(candidates: Iterable[Candidate]) -> Candidate | None:
    """What takes least time; of equals what cuts the model least, then the smaller one."""
    found = list(candidates)
    # times that differ by a percent are equal in such a model
    least = 1.01 * min((each.seconds for each in found), default=0.0)
    fast = [each for each in found if each.seconds <= least]
    return min(fast, key=lambda each: (each.tensor, each.bytes_per_gpu), default=None)


def _of_size(candidates: list[Candidate]) -> Candidate:
    """The best stage of a cut; the smallest one where none fits."""
    best = _best(each for each in candidates if each.fits)
    return best or min(candidates, key=lambda each: each.bytes_per_gpu)
