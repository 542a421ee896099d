"""Memory of a training step in closed form, by component: pure functions of a model's shapes.

With T trained and F frozen elements, w, g and m the bytes of a working weight, a master and a
moment, P data-parallel processes and D = P from stage 1 on (else 1):

| component   | bytes per process                                                               |
|-------------|---------------------------------------------------------------------------------|
| weights     | w (T + F) + what is stored beside edited frozen weights; over P at stage 3      |
| indices     | integer buffers of the projections                                              |
| gradients   | w T, and fp32 copies for the update where masters are kept; see `_gradients`    |
| states      | (g + 2 m) T / D; of matrix-wise optimizers g T / D and see `matrix_state`       |
| activations | what one micro-batch keeps for its backward pass; see `_activations`            |
| transient   | composed weights and their gradients, which live for one product or one step    |

What DeepSpeed allocates beyond that depends on its buckets: `reduce_bucket_size` elements while
gradients are reduced. Workspaces of kernels and the allocator's fragmentation are not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from relora_ds.accounting.footprints import footprints
from relora_ds.accounting.memory.use import MemoryUse
from relora_ds.model.attention import Attention
from relora_ds.model.embedding import TokenEmbedding
from relora_ds.model.mlp import MLP
from relora_ds.model.norm import RMSNorm
from relora_ds.optim.matrix import MatrixOptimizer, units_of
from relora_ds.parallel.footprint import Footprint, UpdateSize
from relora_ds.parallel.shape import global_shape, shard_of

# per token and per weight a projection costs the same whatever the length: one run tells it
_TYPICAL_TOKENS = 4096


@dataclass(frozen=True)
class StoragePlan:
    """How the numbers of a run are stored and cut."""

    working: int
    """Bytes of a working weight, of its gradient and of an activation."""
    master: int
    """Bytes of the copy of a trained weight that the optimizer updates; 0 if it has none."""
    moment: float
    """Bytes of one Adam moment of one element, scales of quantised blocks included."""
    beside_edited: int = 0
    """Bytes stored beside each element of a frozen weight that the method edits."""
    stage: int = 0
    """ZeRO stage."""
    dp_size: int = 1
    """Data-parallel processes."""
    tensor: int = 1
    """Tensor-parallel processes; the model is cut over them already."""
    sequence: bool = False
    """Activations between blocks are cut over the tensor-parallel processes."""
    per_layer: bool = False
    """Each parameter is updated within the backward pass and its gradient freed at once."""
    accumulates: bool = False
    """An update has several micro-batches, over which gradients have to be kept."""
    host: bool = False
    """The process computes on a host."""
    memory: int | None = None
    """Bytes of the device; None where there is no telling."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of working weights, their gradients and activations."""
        return {2: torch.bfloat16, 4: torch.float32}[self.working]


def expected_memory(
    model: nn.Module,
    plan: StoragePlan,
    groups: Sequence[Sequence[nn.Parameter]],
    edited: Sequence[nn.Parameter] = (),
    update: UpdateSize | None = None,
    checkpointing: bool = False,
    rules: Mapping[nn.Parameter, MatrixOptimizer] = MappingProxyType({}),
) -> MemoryUse:
    """Bytes per process by component.

    Args:
        model: a `Llama`, on the meta device at best.
        groups: its trained parameters by optimizer group.
        edited: frozen weights that the method edits.
        update: of the run; without it no activations are counted.
        checkpointing: layers are recomputed in the backward pass.
        rules: the matrix-wise optimizer of every parameter that has one.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    size = update or UpdateSize(_TYPICAL_TOKENS, dtype=plan.dtype)
    costs = list(footprints(model, size).values())
    weights = plan.working * total + plan.beside_edited * sum(p.numel() for p in edited)
    scratch = max((cost.scratch_bytes for cost in costs), default=0)
    return MemoryUse(
        weights=weights // (plan.dp_size if plan.stage >= 3 else 1),
        indices=sum(b.numel() * b.element_size() for b in model.buffers()),
        gradients=_gradients(plan, groups, _stepped_together(model, trained, rules)),
        states=round(state_bytes(plan, trained, rules)),
        activations=(_activations(model, plan, costs, update, checkpointing) if update else 0),
        transient=sum(cost.held_bytes for cost in costs) + scratch,
    )


def state_bytes(
    plan: StoragePlan,
    parameters: Collection[nn.Parameter],
    rules: Mapping[nn.Parameter, MatrixOptimizer],
) -> float:
    """Bytes per process of the masters and the optimizer state of trained parameters.

    Args:
        parameters: of the model's part that a tensor-parallel rank holds.
        rules: the matrix-wise optimizer of every parameter that has one.
    """
    slices = plan.dp_size if plan.stage >= 1 else 1
    ruled = [(parameter, rules[parameter]) for parameter in parameters if parameter in rules]
    elements = sum(parameter.numel() for parameter in parameters)
    moments = 2 * (elements - sum(parameter.numel() for parameter, _ in ruled))
    matrices = sum(
        count * size
        for parameter, rule in ruled
        for count, size in matrix_state(parameter, rule, slices, plan.tensor)
    )
    return (plan.master * elements + plan.moment * moments) / slices + matrices


def matrix_state(
    parameter: nn.Parameter, rule: MatrixOptimizer, slices: int = 1, tensor: int = 1
) -> Iterator[tuple[float, int]]:
    """What a process holds of a matrix's optimizer state: elements of each tensor, bytes of one.

    Of what a rank holds for all others this is the mean over the ranks: matrices take turns.

    Args:
        parameter: this tensor-parallel rank's part of the matrix.
        rule: updates it.
        slices: processes that ZeRO slices optimizer states over; 1 at stage 0.
        tensor: tensor-parallel processes.
    """
    ranks = slices * (1 if shard_of(parameter) is None else tensor)
    for declared in rule.state(global_shape(parameter)).values():
        elements = {
            "slice": parameter.numel() / slices,
            "owner": declared.shape.numel() / ranks,
            "everyone": declared.shape.numel(),
        }
        yield elements[declared.held], declared.dtype.itemsize


def _stepped_together(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    rules: Mapping[nn.Parameter, MatrixOptimizer],
) -> list[list[nn.Parameter]]:
    """What an update within the backward pass waits for: parameters, or both factors of pairs."""
    named = {name: p for name, p in model.named_parameters() if p in rules}
    units = units_of({name: rules[p] for name, p in named.items()})
    return [[p] for p in trained if p not in rules] + [[named[n] for n in unit] for unit in units]


def _gradients(
    plan: StoragePlan,
    groups: Sequence[Sequence[nn.Parameter]],
    units: Sequence[Sequence[nn.Parameter]],
) -> int:
    """The most between the last backward pass and the end of the update.

    Stage 0 casts all gradients before it updates the first master. Later stages cast group by
    group; the figure is exact for one process and an upper bound for more, because what a process
    frees early depends on where its slice of a group begins. One process updates from fp32
    gradients where they lie, and at stage 1 so do more.
    """
    sizes = [sum(p.numel() for p in group) for group in groups]
    if plan.per_layer:
        # the last one of a unit comes while the others' are in the type of their masters
        one = max(units, key=lambda unit: sum(p.numel() for p in unit))
        together = sum(p.numel() for p in one)
        last = max(p.numel() for p in one) if plan.master else together
        return plan.working * (sum(sizes) if plan.accumulates else last) + plan.master * together
    working = plan.working * sum(sizes)
    if not plan.master:
        return working
    if plan.stage == 0:
        return working + plan.master * sum(sizes)
    flat = plan.stage == 1 or (plan.stage == 2 and plan.dp_size == 1)
    if flat and plan.working == plan.master:
        return working
    return working + plan.master * max(sizes) // plan.dp_size


def _activations(
    model: nn.Module,
    plan: StoragePlan,
    costs: Sequence[Footprint],
    update: UpdateSize,
    checkpointing: bool,
) -> int:
    """What autograd keeps between the forward and the backward pass of one micro-batch.

    Per token and layer, in elements: inputs of the two norms and of the projections behind them
    (4 D), q, k, v, attention's output, gate, up and their product; 4 bytes per head and norm. With
    checkpointing a layer's input is all that is left of that. Once per model: the inputs of the
    last norm and the gradient of its output (2 D), 8 bytes of token, and the gradient of the head,
    which the loss computes on the way forward. Sequence parallelism divides what norms keep.
    """
    attention = [module for module in model.modules() if isinstance(module, Attention)]
    embedding = next(module for module in model.modules() if isinstance(module, TokenEmbedding))
    vocab, width = embedding.weight.shape
    heads = 0
    between = width // (plan.tensor if plan.sequence else 1)
    elements = between + width
    saved = 0
    if checkpointing:
        elements += between * len(attention)
    else:
        for layer in attention:
            # q; k and v; attention's output
            keys = layer.k_proj.spec.out_features
            elements += 2 * (between + width) + 2 * (layer.query_width + keys) // plan.tensor
            heads += layer.query_width // layer.head_dim // plan.tensor
        for mlp in (module for module in model.modules() if isinstance(module, MLP)):
            start, stop = mlp.tp.span(mlp.down_proj.spec.in_features)
            elements += 3 * update.mlp_width(stop - start)
        saved = sum(cost.saved_bytes_per_token for cost in costs)
    norms = sum(isinstance(module, RMSNorm) for module in model.modules())
    norms = 1 if checkpointing else norms
    per_token = plan.working * elements + saved + 4 * (heads + norms) + 8
    return update.tokens * per_token + plan.working * vocab * width
