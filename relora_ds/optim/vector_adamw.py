"""AdamW with exact bias correction per rank vector, on whole parameters or any flat cut of them.

Decoupled weight decay (Loshchilov and Hutter, 2019). It knows nothing of DeepSpeed: a layout tells
it, per flat tensor, which stretches belong to parameters with a `VectorClock`. Stretches of one age
go to torch's fused kernel, vectors where some differ in age to a kernel of ours.

A tensor in bf16 is its own master: a few megabytes of it at a time are updated in fp32 and rounded
at random, by draws that depend on the tensor, its step and the element alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.optim.adamw import adamw

from relora_ds.numerics.rounding import round_at_random
from relora_ds.numerics.transfers import upload
from relora_ds.optim.vector_block import (
    Tensors,
    WholeUpdates,
    corrections,
    rectangles_of,
    update_blocks,
)
from relora_ds.optim.vector_clock import Fragment, VectorClock
from relora_ds.randomness import Stream

STRETCH = 1 << 20
"""Elements that are updated at once where they need temporaries; a multiple of every block."""
_CACHED = 1 << 18  # the same per thread of a host, where smaller temporaries are faster
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's two moments in the state of every optimizer here."""


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the memory behind a tensor; DeepSpeed re-wraps flats but keeps their storage."""
    return tensor.untyped_storage().data_ptr()


class VectorAdamW(torch.optim.Optimizer):
    """AdamW whose persistent state is `exp_avg`, `exp_avg_sq` and one scalar `step` per tensor.

    `fragments` maps the storage of each flat tensor to its clocked fragments, in order of offset.
    While it is None (before the layout is known) every element follows the scalar step. `roundings`
    maps the storage of each bf16 tensor to the draws it is rounded by, at event 0.

    Args:
        params: tensors or parameter groups; a group may set `lr` and `weight_decay`.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the bias-corrected second moment.
        weight_decay: decoupled decay; frozen vectors do not decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.fragments: dict[int, list[Fragment]] | None = None
        self.roundings: Mapping[int, Stream] = {}
        self._whole = WholeUpdates()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient.

        Raises:
            KeyError: a flat tensor is not the one that the layout was built for.
        """
        assert closure is None, "a closure would run between ZeRO's reduction and the update"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(
        self, p: torch.Tensor, group: dict[str, Any], scale: torch.Tensor | None = None
    ) -> None:
        """One update of one tensor of a group from its gradient, within `torch.no_grad`.

        Args:
            scale: fp32 scalar that the gradient is multiplied by.
        """
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the host: reading never syncs
            state |= self._first_moments(p)
        completed = int(state["step"])
        state["step"] += 1
        key = storage_key(p)
        fragments = [] if self.fragments is None else self.fragments[key]
        flat, grad = p.view(-1), p.grad.view(-1)
        stretch, rounded = self._stretch(p), p.dtype == torch.bfloat16
        if self._whole.serve(p, grad, state["exp_avg"], fragments, completed):
            stream = replace(self.roundings[key], event=completed) if rounded else None
            return self._whole.update(
                Tensors(flat, grad, *(state[name].view(-1) for name in MOMENTS)),
                [state.get(f"{name}_scale") for name in MOMENTS],
                *(fragments, completed, group, scale, stream),
            )
        for start in range(0, flat.numel(), stretch):
            stop = min(flat.numel(), start + stretch)
            part, inner = flat[start:stop], _within(fragments, start, stop, flat.numel())
            values, slope = part, grad[start:stop]
            if rounded:
                values, slope = values.float(), slope.float()
            if scale is not None:
                slope.mul_(scale)
            moments = self._load(state, start, stop)
            advance(values, slope, moments, inner, completed, group)
            self._store(state, start, stop, moments)
            if rounded:
                stream = replace(self.roundings[key], event=completed)
                round_at_random(values, part, stream, start)

    def update_early(
        self, p: torch.Tensor, group: dict[str, Any], scale: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """One update of one tensor within the backward pass, as soon as it has a gradient.

        Args:
            scale: fp32 scalar that the gradient is multiplied by.

        Returns:
            The tensors that were updated.
        """
        self.update(p, group, scale)
        return [p]

    def state_forms(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the state of a tensor holds beside its `step`, as tensors without memory."""
        return self._first_moments(torch.empty_like(p, device="meta"))

    def _stretch(self, p: torch.Tensor) -> int:
        """How many elements are updated at once."""
        return cached_stretch(p) if p.dtype == torch.bfloat16 else max(1, p.numel())

    def _first_moments(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the state holds of both moments before the first update."""
        kind = torch.promote_types(p.dtype, torch.float32)
        return {key: torch.zeros_like(p, dtype=kind) for key in MOMENTS}

    def _load(self, state: dict[str, torch.Tensor], start: int, stop: int) -> Moments:
        """Both moments of a stretch in fp32, 1-D, to be updated in place."""
        first, second = (state[key].view(-1)[start:stop] for key in MOMENTS)
        return first, second

    def _store(
        self, state: dict[str, torch.Tensor], start: int, stop: int, moments: Moments
    ) -> None:
        """Take the updated moments into the state; here they are views of it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore a state bit for bit; torch itself would cast it to the parameters' type."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = state_dict["state"]
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        owners = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, owner in zip(numbers, owners, strict=True):
            if number in saved:
                self.state[owner] = {
                    key: value.to("cpu" if key == "step" else owner.device)
                    for key, value in saved[number].items()
                }


Moments = tuple[torch.Tensor, torch.Tensor]


def cached_stretch(p: torch.Tensor) -> int:
    """How many elements to update at once where they need temporaries."""
    return STRETCH if p.device.type != "cpu" else _CACHED * torch.get_num_threads()


def advance(
    p: torch.Tensor,
    grad: torch.Tensor,
    moments: Moments,
    fragments: list[Fragment],
    completed: int,
    group: dict[str, Any],
) -> None:
    """One AdamW update in place of a tensor and its moments, all of one shape.

    Args:
        fragments: its clocked fragments, in order of offset.
        completed: updates of the tensor before this one.
        group: `lr`, `betas`, `eps` and `weight_decay`.
    """
    tensors = Tensors(*(t.view(-1) for t in (p, grad, *moments)))
    runs = list(_runs(fragments, completed + 1, p.numel()))
    aged = [run for run in runs if isinstance(run, Fragment)]
    if aged:
        factors = _factors([fragment.clock for fragment in aged], completed + 1, group, p)
        update_blocks(tensors, list(rectangles_of(aged)), factors, tuple(group["betas"]))
    for run in runs:
        if not isinstance(run, Fragment):
            _update_run(tensors, run, group)


def _update_run(tensors: Tensors, run: _Run, group: dict[str, Any]) -> None:
    """Elements of one age are plain AdamW: torch's kernel does it in one pass."""
    start, stop, age = run
    p, grad, exp_avg, exp_avg_sq = ([tensor[start:stop]] for tensor in tensors)
    beta1, beta2 = group["betas"]
    adamw(
        p,
        grad,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sqs=[],
        # the kernel's own count, which it increments
        state_steps=[torch.full((), age - 1, dtype=torch.float32, device=p[0].device)],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _factors(
    clocks: list[VectorClock], step: int, group: dict[str, Any], like: torch.Tensor
) -> torch.Tensor:
    """Four numbers per vector of all clocks: `update_blocks`' live, decay, slope and shift.

    With c1 = 1 - beta1^t and c2 = 1 - beta2^t, the bias-corrected denominator of the first moment,
    c1 * (sqrt(v / c2) + eps), is sqrt(v) * (c1 / sqrt(c2)) + eps * c1: two numbers per vector are
    all that distinguishes it from plain AdamW. Both are divided by the learning rate here.
    """
    # numpy, for all clocks at once: these are few numbers, and many operations on them
    born, thaw = np.concatenate([clock.times for clock in clocks], axis=1)
    (beta1, beta2), lr, live = group["betas"], group["lr"], thaw < step
    ages = step - born
    slopes, shifts = corrections(beta1, beta2, 1 << int(ages.max()).bit_length())
    # in float64 and rounded once, as scalars would be; a factor of one keeps all bits
    factors = np.ones((4, len(ages)), np.float64 if like.dtype == torch.float64 else np.float32)
    factors[0] = live
    if group["weight_decay"]:
        np.copyto(factors[1], 1.0 - lr * group["weight_decay"], where=live)
    if lr:
        factors[2] = slopes[ages] / lr
        factors[3] = shifts[ages] * (group["eps"] / lr)
    # whatever the moment, no update
    np.copyto(factors[3], np.inf, where=~live if lr else True)
    return upload(torch.from_numpy(factors), like.device).to(like.dtype)


_Run = tuple[int, int, int]
"""First element, end and Adam step of a stretch whose elements all have the same age."""


def _runs(fragments: list[Fragment], step: int, length: int) -> Iterator[_Run | Fragment]:
    """Cover the flat tensor with as few runs as possible.

    Where the vectors of any fragment differ, every fragment is yielded as it is, and the runs lie
    between them: one call updates them all, while a run costs a call of its own.
    """
    run: _Run | None = None
    for piece in _pieces(fragments, step, length):
        if not isinstance(piece, Fragment) and run is not None and piece[2] == run[2]:
            run = (run[0], piece[1], run[2])
            continue
        if run is not None:
            yield run
        run = None if isinstance(piece, Fragment) else piece
        if isinstance(piece, Fragment):
            yield piece
    if run is not None:
        yield run


def _pieces(fragments: list[Fragment], step: int, length: int) -> Iterator[_Run | Fragment]:
    births = [fragment.clock.common_birth(step - 1) for fragment in fragments]
    differ, at = None in births, 0
    for fragment, birth in zip(fragments, births, strict=True):
        if at < fragment.offset:  # no clock: the flat tensor's own step
            yield at, fragment.offset, step
        yield fragment if differ or birth is None else (fragment.offset, fragment.end, step - birth)
        at = fragment.end
    if at < length:
        yield at, length, step


def _within(fragments: list[Fragment], start: int, stop: int, length: int) -> list[Fragment]:
    """The parts of fragments that lie in [start, stop), in its own coordinates."""
    if stop - start == length:
        return fragments
    parts = []
    for fragment in fragments:
        low, high = max(fragment.offset, start), min(fragment.end, stop)
        if low < high:
            first = fragment.start + low - fragment.offset
            parts.append(replace(fragment, start=first, offset=low - start, length=high - low))
    return parts
