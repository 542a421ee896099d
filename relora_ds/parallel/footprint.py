"""What a projection takes up and exchanges in an update, beyond its parameters and its input.

These are the words in which a layer may state its costs; `accounting.footprints` measures those of
a layer that states nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from relora_ds.numerics.padding import padded_width

Operation = Literal["all_reduce", "all_gather", "reduce_scatter"]
Pass = Literal["forward", "backward"]
Formulation = Literal["auto", "split", "layer", "step"]
"""How a projection multiplies with what it is made of; see `train.formulation`."""


@dataclass(frozen=True)
class UpdateSize:
    """What one update reads on one process, what it computes in, and how."""

    tokens: int
    """Tokens of one micro-batch; at least 1."""
    micro_batches: int = 1
    """Micro-batches of the update; at least 1."""
    dtype: torch.dtype = torch.float32
    """Type of working weights and activations."""
    formulation: Formulation = "auto"
    """What the run asks of projections that have a choice."""
    device: str = "cpu"
    """Type of the device that computes."""
    keeps_composed: bool = True
    """Whether there is room for every projection's dense weight during the update."""
    pads_mlp: bool = False
    """Whether activations within MLPs are widened where their rows are not aligned."""

    def mlp_width(self, width: int) -> int:
        """Columns that a process's activations within an MLP have in memory.

        Args:
            width: this process's part of `intermediate_size`.
        """
        return padded_width(width, self.dtype.itemsize) if self.pads_mlp else width


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind that an update issues over the tensor-parallel group."""

    operation: Operation
    phase: Pass
    """The pass that is under way; what is recomputed belongs to `backward`."""
    calls: int
    elements: int
    """Elements of all calls together, of whole tensors: what is gathered or there to scatter."""


@dataclass(frozen=True)
class Footprint:
    """Costs of one projection on one process in one update."""

    exchanges: tuple[Exchange, ...] = ()
    """Within the projection: joining the parts of a block's output is the model's."""
    held_bytes: int = 0
    """Bytes of tensors that outlive a micro-batch; see `Projection.held`."""
    saved_bytes_per_token: int = 0
    """What autograd keeps for the backward pass beside the input and the weights; nothing where
    the forward pass is recomputed."""
    scratch_bytes: int = 0
    """Most weight-sized temporaries at one moment of a forward or backward pass. Gradients of
    parameters are not among them."""
