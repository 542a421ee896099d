"""The run description: the sections of RUN.yaml and the single keys beside them.

Sections mirror the file. Rules between fields live in `checks` and beside a method's settings,
reading files in `load`.
"""

from __future__ import annotations

from relora_ds.config.base import FilePath, Free, Section
from relora_ds.config.methods.catalogue import MethodConfig
from relora_ds.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GuardsConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from relora_ds.config.spread.islands import IslandsConfig


class RunConfig(Section):
    """One training run. Paths are taken relative to the current directory, those with `~/` to the
    home directory."""

    output_dir: Free[FilePath]
    """Everything the run writes goes here."""
    model: Free[FilePath]
    """JSON file with HF `LlamaConfig` keys, or the directory of a model that holds its
    `config.json`."""
    deepspeed: Free[FilePath]
    """JSON file with DeepSpeed's own keys; what is `"auto"` there comes from this file, or is
    DeepSpeed's default."""
    method: MethodConfig
    """Training method and its settings."""
    data: DataConfig = DataConfig()
    """Corpus."""
    train: TrainConfig
    """Length, batch, precision."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""
    parallel: Free[ParallelConfig] = ParallelConfig()
    """Tensor parallelism and islands."""
    islands: IslandsConfig = IslandsConfig()
    """Rounds of islands, over slow links."""
    eval: Free[EvalConfig] = EvalConfig()
    """Validation."""
    checkpoint: Free[CheckpointConfig] = CheckpointConfig()
    """Checkpoints."""
    guards: Free[GuardsConfig] = GuardsConfig()
    """Steps that are not to be believed."""
    log: Free[LogConfig] = LogConfig()
    """Telemetry."""
