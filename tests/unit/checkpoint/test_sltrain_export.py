"""The dense model that is exported computes what the sparse plus low-rank one does."""

from __future__ import annotations

import pytest
import torch

from relora_ds.config.methods.full import FullConfig
from relora_ds.config.methods.sltrain import SLTrainConfig
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.methods.build import build_model, dense_weights
from relora_ds.methods.full import Full
from relora_ds.methods.sltrain.sltrain import SLTrain
from relora_ds.model.init import InitialWeights

ARCHITECTURE = ModelConfig(
    vocab_size=53,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    initializer_range=0.1,
)


@pytest.mark.parametrize("buffers", [True, False])
def test_logits_of_the_dense_model(buffers: bool) -> None:
    train = TrainConfig(
        steps=1, seq_length=8, micro_batch_size=1, global_batch_size=1, precision="fp32"
    )
    method = SLTrain(SLTrainConfig(name="sltrain", rank=3, sparsity=0.1), 42, 1)
    source, cpu = InitialWeights(ARCHITECTURE, 42), torch.device("cpu")
    model = build_model(ARCHITECTURE, method, train, source, cpu)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    tokens = torch.randint(0, 53, (2, 8), generator=generator)
    # a checkpoint holds the positions; what is handed between phases holds parameters alone
    values = model.state_dict() if buffers else dict(model.named_parameters())
    weights = dict(dense_weights(ARCHITECTURE, method, train, values))
    full = Full(FullConfig(name="full"), 42, 1)
    dense = build_model(ARCHITECTURE, full, train, lambda name, _: weights[name], cpu)
    with torch.no_grad():
        expected, found = model.logits(tokens), dense.logits(tokens)
    assert float((found - expected).norm() / expected.norm()) <= 1e-5
