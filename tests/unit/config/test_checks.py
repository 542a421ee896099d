"""Rules between fields: each fires on its own, and names both sides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from relora_ds.config.load import check_processes, load_run_config
from relora_ds.config.methods.lora import LoRAConfig
from relora_ds.config.model import ModelConfig, projection_shapes
from relora_ds.config.rules.tensors import rank_fits_projections
from relora_ds.config.rules.training import multiples_near
from relora_ds.errors import ConfigError

ProblemsOf = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("overrides", "key", "parts"),
    [
        (["train.seq_length=257"], "train.seq_length", ("257", "max_position_embeddings is 256")),
        (["log.profile=[4, 3]"], "log.profile", ("[4, 3]", "the earlier step first")),
        (["log.profile=[1000000000, 1000000001]"], "log.profile", ("train.steps is",)),
        (["train.micro_batch_size=5"], "train.global_batch_size", ("is 16", "(5)", "15 or 20")),
        (["method.warm_start_steps=1000"], "method.warm_start_steps", ("train.steps (1000)",)),
        (["train.steps=70"], "schedule.warmup_steps", ("is 20", "the 20 steps after")),
        (
            ["method={name: lora, rank: 8}", "train.steps=20"],
            "schedule.warmup_steps",
            ("is 20", "less than train.steps (20)"),
        ),
        (
            ["schedule.name=wsd", "schedule.decay_steps=930"],
            "schedule.decay_steps",
            ("is 930", "(20)", "the 950 steps after"),
        ),
        (["method.restart_warmup_steps=100"], "method.restart_warmup_steps", ("is 100", "(100)")),
        (["method.adjust_step=81"], "method.adjust_step", ("is 81", "(20)", "(100)")),
        (["method.rank=64"], "method.rank", ("is 64", "q_proj is 64 x 64", "write 63 or less, 16")),
        (["method={name: low_rank, rank: 65}"], "method.rank", ("is 65", "q_proj is 64 x 64")),
        (
            ["method={name: sltrain, rank: 8, alpha: 4, scale: 0.25}"],
            "method.scale",
            ("is 0.25", "method.alpha (4)", "= 0.5", "remove one"),
        ),
        (
            ["method={name: sltrain, rank: 8, sparsity: 1.0e-4}"],
            "method.sparsity",
            ("is 0.0001", "4096 elements", "2.4e-04 or more"),
        ),
        (
            ["method={name: sltrain, rank: 8}", "train.init_from=runs/a"],
            "train.init_from",
            ("is runs/a", "method sltrain draws"),
        ),
        (["method={name: sltrain, rank: 64}"], "method.rank", ("is 64", "q_proj is 64 x 64")),
        (
            ["train.precision=bf16", "train.master_weights=false"],
            "train.master_weights",
            ("is false", "at every stage", "write train.per_layer_update: true"),
        ),
        (
            ["train.precision=fp32", "train.master_weights=false", "train.per_layer_update=true"],
            "train.master_weights",
            ("is false", "their own masters", "write precision: bf16"),
        ),
        (
            ["method={name: full}", "train.per_layer_update=true", "optimizer.name=torch_adamw"],
            "train.per_layer_update",
            ("is true", "it is torch_adamw", "use adamw"),
        ),
        (
            ["optimizer.name=adamw8bit", "method.reset.mode=magnitude"],
            "method.reset.mode",
            ("is magnitude", "adamw8bit stores codes", "zero or random"),
        ),
        (["optimizer.name=torch_adamw"], "method.reset.steps", ("adamw", "write false")),
        (
            ["method={name: switchlora, rank: 8, interval: 9}"],
            "method.interval",
            ("is 9", "twice method.freeze_steps (5)", "write 10 or more"),
        ),
        (
            ["method={name: switchlora, rank: 60, interval: 10}"],
            "method.interval",
            ("6 of 60 vectors", "only 4 are free", "shortest side (64)"),
        ),
        (
            ["method={name: switchlora, rank: 1, interval: 10}"],
            "method.interval",
            ("1 of 1 vectors", "only 0 are free"),
        ),
        (["method={name: switchlora, rank: 64}"], "method.rank", ("is 64", "63 or less")),
        (
            ["method={name: switchlora, rank: 8, trainable_scaling: true}"],
            "method.trainable_scaling",
            ("write false", "method.alpha"),
        ),
        (
            ["method={name: switchlora, rank: 8}", "optimizer.name=fused_adam"],
            "optimizer.name",
            ("is fused_adam", "use adamw"),
        ),
        (["data.valid=null"], "data.valid", ("needed with data.source files", "prepare_data")),
        (["data.valid=null"], "data.valid", ("or valid_share for a part of data.train",)),
        (["data.valid_share=0.01"], "data.valid_share", ("beside data.valid", "remove one")),
        (["data.valid_share=1"], "data.valid_share", ("less than 1",)),
        (["data.valid_share=0"], "data.valid_share", ("greater than 0",)),
        (
            ["data={source: builtin, valid_share: 0.1}"],
            "data.valid_share",
            ("ignored with data.source builtin",),
        ),
        (["data.train=[]"], "data.train", ("needed with data.source files",)),
        (["data.cache_dir=x"], "data.cache_dir", ("ignored with data.source files",)),
        (
            ["data={source: builtin, builtin_vocab_size: 4096}"],
            "data.builtin_vocab_size",
            ("is 4096", "vocab_size is 2048"),
        ),
        (
            ["train.precision=fp32", "train.base_precision=bf16"],
            "train.base_precision",
            ("is bf16", "train.precision is fp32", "write auto or fp32"),
        ),
        (["train.precision=fp32", "train.attention=flash"], "train.attention", ("auto or sdpa",)),
        (
            ["method.warm_start_steps=0", "optimizer.matrix=muon"],
            "optimizer.matrix",
            ("is muon", "does not train them", "method.warm_start_steps"),
        ),
        (["parallel.tensor=3"], "parallel.tensor", ("must divide", "write 2 or 4")),
        (["parallel.sequence=true"], "parallel.sequence", ("parallel.tensor is 1", "use false")),
        (
            ["parallel.tensor=2", "parallel.sequence=true", "train.seq_length=127"],
            "train.seq_length",
            ("is 127", "(2) equal parts", "126 or 128"),
        ),
        (
            ["parallel.tensor=2", "parallel.low_rank_plan=act", "method.rank=7"],
            "parallel.low_rank_plan",
            ("method.rank (7)", "multiple of 2", "write fold"),
        ),
        (
            ["checkpoint.allow_change=[train.stps]"],
            "checkpoint.allow_change[0]",
            ('is "train.stps"', "did you mean `train.steps`?"),
        ),
    ],
)
def test_a_broken_rule_is_one_problem(
    run_file: Path, overrides: list[str], key: str, parts: tuple[str, ...], problems_of: ProblemsOf
) -> None:
    problems = problems_of(run_file, *overrides)
    assert len(problems) == 1, problems
    assert key in problems[0]
    for part in parts:
        assert part in problems[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.adjust_step=80"],
        ["optimizer.name=torch_adamw", "method.reset.steps=false"],
        ["optimizer.name=adamw8bit", "train.per_layer_update=true"],
        ["data={source: builtin}"],
        ["method.reset={mode: zero, fraction: 0.5}"],
        ["method.rank=63", "train.seq_length=256"],
        ["checkpoint.allow_change=[train.steps, method.rank]"],
        ["method={name: full}", "train.base_precision=auto"],
        ["method={name: sltrain, rank: 63, scale: 0.25, sparsity: 3.0e-4}"],
        ["data.builtin_vocab_size=2048"],
        ["optimizer.spectral.momentum=0.95", "optimizer.muon.nesterov=true"],
        ["islands.transport={bits: 32, error_feedback: true}", "islands.outer.lr=1.0"],
        ["schedule={name: constant, min_lr_ratio: 0.1}", "guards.loss_spike.window=128"],
    ],
)
def test_the_edge_of_a_rule_is_allowed(run_file: Path, overrides: list[str]) -> None:
    assert load_run_config(run_file, overrides).warnings == ()


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["method.merge_every=950"], "runs for 950 steps: no merge will happen"),
        (["method.warm_start_steps=0", "method.warm_start_lr=1"], "warm_start_lr"),
        (["method={name: full}", "train.base_precision=bf16"], "no frozen base weights"),
        (["optimizer.spectral.lr=0.02"], "write optimizer.adapter: spectral, or remove"),
        (["optimizer.muon.steps=keller"], "optimizer.matrix is not given; write"),
        (
            ["method={name: full}", "optimizer={matrix: muon, scale: {momentum: 0.8}}"],
            "has no effect: optimizer.matrix is muon",
        ),
        (["islands.transport.bits=4"], "has no effect: parallel.islands is 1"),
        (["islands.outer.momentum=0.9"], "has no effect: parallel.islands is 1"),
        (
            ["parallel.islands=2", "islands.transport.error_feedback=false"],
            "islands.transport.bits is 32",
        ),
        (["guards.loss_spike.sigma=4"], "guards.loss_spike.action is off"),
        (["schedule={name: constant, min_lr_ratio: 0.5}"], "which never falls"),
        (["data.valid=data/c4", "data.train=[[1, data/c4], [2, data/w]]"], "data.train holds too"),
    ],
)
def test_probable_mistakes_are_warnings(run_file: Path, overrides: list[str], part: str) -> None:
    warnings = load_run_config(run_file, overrides).warnings
    assert len(warnings) == 1
    assert part in warnings[0]


def test_the_batch_is_checked_against_the_processes(run_file: Path) -> None:
    run = load_run_config(run_file)
    check_processes(run, 4)
    with pytest.raises(ConfigError) as error:
        check_processes(run, 3)
    (problem,) = error.value.problems
    assert problem.startswith(f"{run_file}:20: train.global_batch_size: is 16")
    assert (
        "12 = train.micro_batch_size (4) x data-parallel processes (3): write 12 or 24, "
        "or start 2 data-parallel processes with train.micro_batch_size=4 for the same batch"
    ) in problem
    with pytest.raises(ConfigError, match=r"or set train\.micro_batch_size=2 for the"):
        check_processes(run, 8)


@pytest.mark.parametrize(
    ("heads", "head_dim", "remedy"),
    [
        (4, 16, "q_proj is 64 x 64: write 63 or less, 16 (a quarter of the hidden size) is usual"),
        (1, 16, "k_proj is 16 x 64: write 15 or less"),
        (1, 1, "k_proj is 1 x 64: no rank is; use method.name=full, or a model with wider layers"),
    ],
)
def test_the_rank_that_is_named_can_be_taken(heads: int, head_dim: int, remedy: str) -> None:
    architecture = ModelConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=heads,
        head_dim=head_dim,
    )
    method = LoRAConfig(name="lora", rank=96)
    (finding,) = rank_fits_projections(method, architecture)
    assert finding.message.endswith(remedy)


def test_nearest_multiples() -> None:
    assert (multiples_near(10, 4), multiples_near(3, 4)) == ("8 or 12", "4")


def test_projections_of_grouped_query_attention() -> None:
    shapes = projection_shapes(
        ModelConfig(
            vocab_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip
    assert shapes["self_attn.q_proj"] == (32, 64)
    assert shapes["self_attn.k_proj"] == shapes["self_attn.v_proj"] == (16, 64)
    assert shapes["self_attn.o_proj"] == (64, 32)
    assert shapes["mlp.down_proj"] == (64, 96)
