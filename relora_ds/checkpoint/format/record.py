"""What a checkpoint says of itself: the run, its model, and how far it came."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, JsonValue, ValidationError

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.stamp import Origin
from relora_ds.checkpoint.format.upgrade import FORMAT, KEY, STAMPED, Contents, format_of, upgrade
from relora_ds.config.base import NonNegativeInt, PositiveInt, Section
from relora_ds.config.explain import explain
from relora_ds.config.free import covers, flat_settings, free_keys
from relora_ds.config.load import dump_run_config, validate_run
from relora_ds.config.model import ModelConfig
from relora_ds.config.reading.document import Document
from relora_ds.config.reading.source import read_yaml
from relora_ds.config.schema import RunConfig
from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.files.regular import read_regular

S = TypeVar("S", bound=Section)
RECORD = (layout.TRAINER, layout.RUN, layout.MODEL)
"""Names of the files that hold a `RunRecord`."""

_SUMS = "sha256"
"""Where `trainer.json` keeps the SHA-256 of the other two descriptions."""
_RUN = "run_digest"
"""Where it keeps what files of tensors name as their run."""
_MAX_BYTES = 64 << 20  # what a method keeps beside its tensors is some thousand numbers


class ShardedLike(Section):
    """A tensor of the method's state that tensor parallelism shards."""

    parameter: str
    """Full name of the parameter that it is sharded like."""
    dim: NonNegativeInt
    """Dimension of the tensor that is sharded."""


class GuardState(Section):
    """What the guards of a run remember."""

    skipped_steps: NonNegativeInt = 0
    """Updates that were not applied so far, those that a rollback leaves out included."""
    rollbacks: NonNegativeInt = 0
    """Times that the run went back to a checkpoint."""
    events: NonNegativeInt = 0
    """Batches that were skipped and rollbacks, together."""
    left_out: list[NonNegativeInt] = Field(default_factory=list)
    """Steps, from 0, whose batches are not trained on."""
    losses: list[float] = Field(default_factory=list)
    """Last losses, oldest first; as many as a spike is measured by."""
    norms: list[float] = Field(default_factory=list)
    """Gradient norms of the same updates."""


class TrainerState(Section):
    """What is needed to go on, beside tensors.

    Nothing in a run draws from a global random generator, so there is no generator state to keep:
    the seed and the step are the state, and they also fix the position in the data.

    A later version may add a key that has a default; to rename or remove one takes a step in
    `upgrade`.
    """

    step: NonNegativeInt
    """Completed updates of the run."""
    tokens: NonNegativeInt
    """Tokens trained on."""
    phase: str
    """Registry key of the method in charge; the model on disk is built by it."""
    dp_size: PositiveInt
    """Data-parallel processes; DeepSpeed's shards belong to this many."""
    tp_size: PositiveInt
    """Tensor-parallel processes; every one has shards of its own."""
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    """ZeRO stage of the shards."""
    method: dict[str, JsonValue]
    """The method's own state without its tensors, which have a file of their own."""
    telemetry: dict[str, str | None]
    """What continues the curves."""
    data_fingerprints: list[str]
    """Identity of every token file, training files first."""
    method_shards: dict[str, ShardedLike] | None = None
    """How tensors of the method's state are sharded over tensor-parallel processes; null where the
    writer did not say, as in format 0."""
    guards: GuardState = GuardState()
    """What the guards remember."""
    arithmetic: str | None = None
    """What computed the last steps, as `describe_arithmetic` says it; null where the writer did not
    say."""
    imported_from: str | None = None
    """Directory in Hugging Face's layout that the weights are from; null in a checkpoint of a run.
    An import has step 0 and no optimizer state: runs begin with it."""


@dataclass(frozen=True)
class RunRecord:
    """Everything that a checkpoint holds beside tensors."""

    trainer: TrainerState
    config: RunConfig
    """The resolved run."""
    architecture: ModelConfig
    """Its model."""
    format: int = field(default=FORMAT, compare=False)
    """Number of the format that it was read from."""
    run: str = field(default="", compare=False)
    """Digest of the run as it was read; empty in a record that is to be written."""

    @cached_property
    def origin(self) -> Origin:
        """Where the checkpoint's files of tensors come from."""
        return Origin(self.trainer.step, self.run or self._run_digest())

    def _run_digest(self) -> str:
        """Of everything that the weights depend on: equal runs may take each other's files.

        It is kept when it is written, for a later version knows more settings.
        """
        free = free_keys(RunConfig)
        settings = flat_settings(self.config.model_dump(mode="json"))
        kept = {key: value for key, value in settings if not covers(free, key)}
        files = self.run_files[layout.MODEL].decode(), self.trainer.data_fingerprints
        return _sum(json.dumps([kept, *files], sort_keys=True).encode())

    @cached_property
    def run_files(self) -> Mapping[str, bytes]:
        """Contents of `run.yaml` and `model.json` in today's format, by name."""
        return {
            layout.RUN: dump_run_config(self.config).encode(),
            layout.MODEL: (self.architecture.model_dump_json(indent=1) + "\n").encode(),
        }


def _sums_of(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: _sum(content) for name, content in files.items()}


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def encode_record(record: RunRecord) -> dict[str, bytes]:
    """Contents of `trainer.json`, `run.yaml` and `model.json` in today's format, by name."""
    others = record.run_files
    own = {_SUMS: _sums_of(others), _RUN: record.origin.run}
    trainer = {KEY: FORMAT, **own, **record.trainer.model_dump(mode="json")}
    return {layout.TRAINER: (json.dumps(trainer, indent=1) + "\n").encode(), **others}


def write_record(record: RunRecord, directory: Path) -> None:
    """Write `trainer.json`, `run.yaml` and `model.json` in today's format."""
    for name, content in encode_record(record).items():
        (directory / name).write_bytes(content)


def read_record(checkpoint: Path) -> RunRecord:
    """What a checkpoint of any known format says of itself, with today's defaults filled in.

    Raises:
        CheckpointError: a file is missing or damaged, of a later version, or holds a key or a
            value that this version does not know.
    """
    trainer_path, model_path = checkpoint / layout.TRAINER, checkpoint / layout.MODEL
    try:
        run = read_yaml(checkpoint / layout.RUN)
    except ConfigError as error:
        raise _unusable(error.problems) from error
    trainer = _read_json(trainer_path)
    sums, run_digest = trainer.pop(_SUMS, {}), str(trainer.pop(_RUN, ""))
    read = Contents(trainer, run.data, _read_json(model_path))
    contents = upgrade(read, trainer_path)
    if format_of(read) >= STAMPED:
        _check_sums(checkpoint, sums)
    try:
        config = validate_run(replace(run, data=contents.run))
    except ConfigError as error:
        raise _unusable(error.problems) from error
    return RunRecord(
        _validated(TrainerState, contents.trainer, trainer_path),
        config,
        _validated(ModelConfig, contents.model, model_path),
        format_of(read),
        run_digest,
    )


def _check_sums(checkpoint: Path, sums: object) -> None:
    """Make sure that the three descriptions were written together.

    Raises:
        CheckpointError: one of them is of another checkpoint, or was cut or edited.
    """
    for name in (layout.RUN, layout.MODEL):
        found = hashlib.sha256(read_regular(checkpoint / name, _MAX_BYTES)).hexdigest()
        if not isinstance(sums, dict) or sums.get(name) != found:
            raise _unusable([f"{checkpoint / name}: is not the one that {layout.TRAINER} names"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_regular(path, _MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _unusable([f"{path}: cannot be read ({reason})"]) from error
    if not isinstance(data, dict):
        raise _unusable([f"{path}: must hold an object, not {type(data).__name__}"])
    return data


def _validated(model: type[S], data: dict[str, Any], path: Path) -> S:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        findings = explain(error, data, model)
        raise _unusable(Document(str(path), data).report(findings)) from error


def _unusable(problems: list[str]) -> CheckpointError:
    what = "; ".join(problem.rstrip(".") for problem in problems)
    return CheckpointError(
        f"{what}; the checkpoint is damaged or was written by another version of "
        "relora_ds: use another checkpoint, or that version"
    )
