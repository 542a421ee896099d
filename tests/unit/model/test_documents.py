"""Documents that share a sequence compute what each of them computes alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from relora_ds.config.model import ModelConfig
from relora_ds.model import attention_kernels as kernels
from relora_ds.model import documents
from relora_ds.model.documents import Documents
from relora_ds.model.llama import Llama
from tests.harness.packed import ROWS, alone, packed

END = 7
Build = Callable[..., Llama]


def gradients(model: Llama) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_forms_of_the_same_thing() -> None:
    ids = torch.tensor([[1, END, END, 2, 3], [1, 2, 3, 4, END]])
    found = Documents(ids, END)
    assert found.positions.tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
    assert found.bounds.tolist() == [0, 2, 3, 5, 10]
    assert found.bounds.dtype == torch.int32
    first = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert found.mask[0, 0].int().tolist() == first
    assert found.mask[1, 0].equal(torch.ones(5, 5, dtype=torch.bool).tril())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_those_of_each_alone(
    config: ModelConfig, build: Build, dtype: torch.dtype, tolerance: float, recompute: bool
) -> None:
    model = build(config, activation_checkpointing=recompute).to(dtype).train()
    model.separate_documents(END)
    rows = packed(END, config.vocab_size)
    loss = model(rows, mean=False)
    loss.backward()
    together = gradients(model)
    model.zero_grad()
    model.separate_documents(None)
    parts = [model(text.unsqueeze(0), mean=False) for text in alone(END, config.vocab_size)]
    expected = torch.stack(parts).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    for found, wanted in zip(together, gradients(model), strict=True):
        assert float((found - wanted).norm()) <= 4 * tolerance * float(wanted.norm())


def test_a_document_knows_nothing_of_another(plain: ModelConfig, build: Build) -> None:
    model = build(plain).double()
    model.separate_documents(END)
    ids = torch.tensor([[1, 2, 3, END, 5, 6, 8, 9]])
    other = torch.tensor([[4, 4, 9, END, 5, 6, 8, 9]])
    before, after = model.logits(ids), model.logits(other)
    assert torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.allclose(before[:, :4], after[:, :4])
    shifted = model.logits(torch.tensor([[END, 5, 6, 8, 9]]))
    torch.testing.assert_close(shifted[:, 1:], before[:, 4:], rtol=0, atol=1e-13)


def test_the_mean_over_targets_leaves_out_what_is_none(plain: ModelConfig, build: Build) -> None:
    model = build(plain)
    rows = packed(END, plain.vocab_size)
    model.separate_documents(END)
    total, count = model.token_losses_sum(rows)
    texts = alone(END, plain.vocab_size)
    assert int(count) == sum(len(text) - 1 for text in texts) < rows[:, 1:].numel()
    kept = torch.tensor([False, True])
    assert int(model.token_losses_sum(rows, kept)[1]) == sum(n - 1 for n in ROWS[1])
    # every target weighs the same in every batch
    assert float(model(rows)) == pytest.approx(float(total) / rows[:, 1:].numel())


def test_documents_change_nothing_where_none_ends(plain: ModelConfig, build: Build) -> None:
    model = build(plain)
    tokens = torch.arange(8, 34).view(2, 13)
    expected = model(tokens)
    model.separate_documents(END)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-6, atol=0)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """A stand-in for torch's function for several lengths, which needs a GPU: one after the other,
    by the kernel for whole sequences."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
        assert window_size == (-1, 0)
        assert enable_gqa == (q.shape[1] != k.shape[1])
        assert torch.equal(cu_q, cu_k)
        bounds = cu_q.tolist()
        spans = [slice(*pair) for pair in itertools.pairwise(bounds)]
        assert max(s.stop - s.start for s in spans) <= max_q == max_k
        parts = [kernels._sdpa(q[None, s], k[None, s], v[None, s])[0] for s in spans]
        return torch.cat(parts)

    monkeypatch.setattr(documents, "load_varlen", lambda: varlen)
    return varlen


@pytest.mark.usefixtures("lengths")
def test_lengths_equal_the_mask(
    config: ModelConfig, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(config).double()
    model.separate_documents(END)
    rows = packed(END, config.vocab_size)
    by_mask = model(rows)
    by_mask.backward()
    expected = gradients(model)
    model.zero_grad()
    quick = kernels.Kernel("sdpa", kernels._Lengths(documents.torch_lengths))
    monkeypatch.setattr(kernels, "_select", lambda *args: quick)
    by_lengths = model(rows)
    by_lengths.backward()
    torch.testing.assert_close(by_lengths, by_mask, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-13)
