"""Documents that share a sequence without seeing each other.

The token that ends a document belongs to it; the next position begins another one. So does the
first position of every sequence, whatever came before it in the data.

Shape suffixes: B batch, S sequence, N query heads, K key/value heads, H head dim; T = B * S tokens,
M = documents + 1.
"""

# ruff: noqa: N803, N806 - capital suffixes are tensor shapes
from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from torch.nn import functional as F

Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Causal attention of sequences of several lengths: from queries (T, N, H), keys and values
(T, K, H), the first token of each sequence and the end of the last, int32 (M,), and the greatest
length that one can have, to outputs (T, N, H)."""


class Documents:
    """Which positions of a batch are of the same document. Each form is made when it is first asked
    for, and shared by all layers.

    Args:
        ids_BS: int64, what the model reads.
        end: id that ends a document.
    """

    def __init__(self, ids_BS: torch.Tensor, end: int) -> None:
        begins_BS = F.pad(ids_BS[:, :-1] == end, (1, 0), value=True)
        self._begins_BS = begins_BS

    @cached_property
    def positions(self) -> torch.Tensor:
        """Positions within documents from 0, int64 (B, S)."""
        place_S = torch.arange(self._begins_BS.shape[1], device=self._begins_BS.device)
        return place_S - (place_S * self._begins_BS).cummax(1).values

    @cached_property
    def mask(self) -> torch.Tensor:
        """True where a query (third dimension) sees a key (fourth), earlier ones of its document
        and itself: bool (B, 1, S, S)."""
        number_BS = self._begins_BS.cumsum(1)
        same_BSS = number_BS.unsqueeze(2) == number_BS.unsqueeze(1)
        return same_BSS.tril_().unsqueeze(1)

    @cached_property
    def bounds(self) -> torch.Tensor:
        """First token of every document of the batch, and the end of the last, int32 (M,).

        Waits for the device: it has as many elements as there are documents.
        """
        begins_T = self._begins_BS.flatten()
        return F.pad(begins_T.nonzero().flatten(), (0, 1), value=begins_T.numel()).int()

    def attend(
        self,
        function: Varlen,
        q_BSNH: torch.Tensor,
        k_BSKH: torch.Tensor,
        v_BSKH: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of a batch, (B, S, N, H), by a function for sequences of several lengths."""
        q_TNH, k_TKH, v_TKH = (each.flatten(0, 1) for each in (q_BSNH, k_BSKH, v_BSKH))
        out_TNH = function(q_TNH, k_TKH, v_TKH, self.bounds, q_BSNH.shape[1])
        return out_TNH.view_as(q_BSNH)


def torch_lengths(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    bounds_M: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """torch's own `Varlen`, a flash kernel on GPUs in half precision."""
    function = load_varlen()
    assert function is not None, "lengths were selected without torch's function for them"
    bounds = bounds_M, bounds_M, longest, longest
    grouped = q_TNH.shape[1] != k_TKH.shape[1]
    # a window of all tokens before and none behind: causal
    return function(q_TNH, k_TKH, v_TKH, *bounds, window_size=(-1, 0), enable_gqa=grouped)


def flash_lengths(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    bounds_M: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """flash-attn's `Varlen`, of the package."""
    function = importlib.import_module("flash_attn").flash_attn_varlen_func
    bounds = bounds_M, bounds_M, longest, longest
    deterministic = torch.are_deterministic_algorithms_enabled()
    return function(q_TNH, k_TKH, v_TKH, *bounds, causal=True, deterministic=deterministic)


@cache
def load_varlen() -> Callable[..., Any] | None:
    """torch's function for several lengths; None where this torch has none that can be used."""
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    known = inspect.signature(function).parameters
    return function if {"window_size", "enable_gqa"} <= known.keys() else None
