"""Evaluation by the protocol of published tables, beside the same with transformers' model.

The reference is written from its description: rows of one document each, padded on the right and
without loss there; means of batches, added up and divided by a counter that begins with one; the
mean over processes, each of which has every n-th document.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.data.batches import DocumentBatches, ValidationBatches
from relora_ds.data.prepare import prepare
from relora_ds.data.token_files.megatron import indexed_dataset_module
from relora_ds.data.tokenizer import train_tokenizer
from relora_ds.data.tokens import TokenFile
from relora_ds.errors import ConfigError, DataError
from relora_ds.model.hf.directory import write_hf
from relora_ds.model.init import InitialWeights, dense_shapes
from relora_ds.model.llama import Llama
from relora_ds.train.evaluate import published_score, validation_loss
from relora_ds.train.evaluate_checkpoint import evaluate_checkpoint

PAD, EOS, LENGTH = 1, 2, 12
ARCHITECTURE = ModelConfig(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.5,
)
CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    weights = InitialWeights(ARCHITECTURE, seed=1)
    named = [(name, weights(name, shape)) for name, shape in dense_shapes(ARCHITECTURE).items()]
    write_hf(tmp_path / "model", ARCHITECTURE, named, None, torch.float32)
    return tmp_path / "model"


@pytest.fixture
def model(directory: Path) -> Llama:
    train = TrainConfig(steps=1, seq_length=LENGTH, micro_batch_size=1, global_batch_size=1)
    return DenseModel(directory).model(train, CPU)


def documents() -> list[list[int]]:
    """Shorter and longer ones than a row, ended by `EOS`."""
    generator = np.random.default_rng(0)
    sizes = [1, 40, 11, 12, 3, 2, 25, 12, 7, 1, 30, 9, 5]
    return [[*generator.integers(3, 60, size).tolist(), EOS] for size in sizes]


def written(path: Path, contents: list[list[int]] | None = None) -> TokenFile:
    builder = indexed_dataset_module().IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    for ids in documents() if contents is None else contents:
        builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(f"{path}.idx")
    return TokenFile(path)


def reference(directory: Path, batch_size: int, processes: int, target: int) -> float:
    """The published figure: transformers computes the loss of a batch, labels and all."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    rows = [(ids[:LENGTH] + [PAD] * LENGTH)[:LENGTH] for ids in documents()]
    losses = []
    for process in range(processes):
        own = torch.tensor(rows[process::processes])
        seen, counter, summed = 0, 1, 0.0
        for batch in own.split(batch_size):
            if seen > target:
                break
            counter += 1
            labels = batch.masked_fill(batch == PAD, -100)
            with torch.no_grad():
                output = theirs(input_ids=batch, attention_mask=None, labels=labels)
            summed += float(output.loss)
            seen += int((batch != PAD).sum()) * processes
        losses.append(summed / counter)
    return sum(losses) / processes


@pytest.mark.parametrize(
    ("batch_size", "processes", "target"),
    [(1, 1, 10**7), (4, 1, 10**7), (3, 2, 10**7), (2, 1, 30), (1, 3, 60), (13, 1, 1)],
)
def test_the_figure_is_the_published_one(
    tmp_path: Path,
    directory: Path,
    model: Llama,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    processes: int,
    target: int,
) -> None:
    monkeypatch.setattr(DocumentBatches, "TARGET_TOKENS", target)
    file = written(tmp_path / "tokens")
    expected = reference(directory, batch_size, processes, target)
    shares = [
        DocumentBatches(file, LENGTH, batch_size, rank, processes) for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1, "each of them is a collective operation"
    scores = [published_score(model, share, CPU, distributed=False) for share in shares]
    assert sum(score.loss for score in scores) / processes == pytest.approx(expected, rel=1e-6)
    found = evaluate_checkpoint(directory, str(tmp_path / "tokens"), LENGTH, batch_size, processes)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["protocol"] == "galore_compat"
    assert found["tokens"] == sum(score.tokens for score in scores)


def test_an_evaluation_without_a_target_is_refused(
    tmp_path: Path, directory: Path, model: Llama
) -> None:
    file = written(tmp_path / "tokens", [[EOS]] * 40)
    said = "no token that the evaluation reads is a target"
    with pytest.raises(DataError, match=said):
        evaluate_checkpoint(directory, str(tmp_path / "tokens"), LENGTH, 2, 3)
    model.separate_documents(EOS)
    with pytest.raises(DataError, match=said):
        validation_loss(model, ValidationBatches(file, LENGTH, 2, 0, 1), CPU, distributed=False)


def test_rows_of_equal_weight_differ_by_the_counter_alone(tmp_path: Path, model: Llama) -> None:
    """Then it is the exact loss times n / (n + 1)."""
    builder = indexed_dataset_module().IndexedDatasetBuilder(f"{tmp_path}/t.bin", dtype=np.uint16)
    generator = np.random.default_rng(1)
    for _ in range(12):
        builder.add_item(torch.from_numpy(generator.integers(3, 60, LENGTH)))
        builder.end_document()
    builder.finalize(f"{tmp_path}/t.idx")
    batches = DocumentBatches(TokenFile(tmp_path / "t"), LENGTH, 2, 0, 1)
    score = published_score(model, batches, CPU, distributed=False)
    assert (score.batches, score.tokens) == (6, 12 * (LENGTH - 1))
    assert score.loss == pytest.approx(score.token_loss * 6 / 7, rel=1e-12)
    losses = []
    for tokens, mask in batches:
        logits = model.logits(tokens)[:, :-1].double()
        targets = tokens[:, 1:]
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        losses.append(each[mask.flatten()])
    assert score.token_loss == pytest.approx(float(torch.cat(losses).detach().mean()), rel=1e-6)


@pytest.mark.parametrize("multiple", [2, 3, 4, 11, 12])
def test_positions_that_are_added_for_an_even_cut_change_nothing(
    tmp_path: Path, model: Llama, multiple: int
) -> None:
    """Processes that share a sequence have equally many positions of it."""
    file = written(tmp_path / "tokens")
    plain = DocumentBatches(file, LENGTH, 4, 0, 1)
    padded = DocumentBatches(file, LENGTH, 4, 0, 1, multiple=multiple)
    for (tokens, mask), (more, kept) in zip(plain, padded, strict=True):
        assert kept.shape[1] % multiple == 0
        assert more.shape[1] == kept.shape[1] + 1 <= LENGTH + multiple
        assert torch.equal(more[:, :LENGTH], tokens)
        assert torch.equal(kept[:, : LENGTH - 1], mask)
        assert not kept[:, LENGTH - 1 :].any()
    expected, found = (published_score(model, each, CPU, False) for each in (plain, padded))
    assert (found.tokens, found.batches) == (expected.tokens, expected.batches)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_a_row_that_is_cut_ends_as_documents_do(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"line {n} of a text" * n for n in range(1, 40)))
    tokenizer = train_tokenizer([tmp_path / "text.txt"], 300, tmp_path / "tokenizer.model")
    prepare([tmp_path / "text.txt"], tmp_path / "tokenizer.model", tmp_path / "tokens")
    file = TokenFile(tmp_path / "tokens")
    rows = [
        (row, int(kept.sum()) + 1)
        for tokens, mask in DocumentBatches(file, 30, 4, 0, 1)
        for row, kept in zip(tokens, mask, strict=True)
        if kept.any()
    ]
    assert len(rows) == file.num_documents == 39
    whole = [file.document_start(n + 1) - file.document_start(n) for n in range(39)]
    assert [length for _, length in rows] == [min(size, 30) for size in whole]
    assert max(whole) > 30 > min(whole)
    assert all(int(row[length - 1]) == tokenizer.eos_id for row, length in rows)


@pytest.mark.parametrize(("length", "ranks"), [(1, 1), (65, 1), (12, 0)])
def test_sizes_that_make_no_row_are_refused(
    tmp_path: Path, directory: Path, length: int, ranks: int
) -> None:
    written(tmp_path / "tokens")
    with pytest.raises(ConfigError, match=r"the model takes 2 to 64 tokens|dealt out to 1 or more"):
        evaluate_checkpoint(directory, str(tmp_path / "tokens"), length, 1, ranks)
