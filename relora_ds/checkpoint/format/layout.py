"""Every name in a directory of checkpoints, each written down once.

    checkpoints/
      latest                        name of the newest complete checkpoint
      step_N/                       a checkpoint after N updates
        trainer.json                format number, step, phase, tokens, topology, method state
        run.yaml, model.json        the resolved run and its architecture
        tokenizer.model             if the run has one; or tokenizer.json, tokenizer_config.json
                                    and special_tokens_map.json
        method.safetensors          tensors of the method's state, if it has any
        side.safetensors            vector clocks and base-weight residuals
        side_rank_R.safetensors     residuals of rank R's slices, where ZeRO shards weights
        round_rank_R.safetensors    what rank R's island holds apart from others, if it does
        manifest.json               size and SHA-256 of all of these
      step_N.tmp/                   one that is being written, or was when a process died
      step_N.stale/                 one that is being removed, or that a later save replaces
      step_N.stray                  what had the name of a checkpoint without being one
      latest.tmp                    what `latest` is about to name

Weights and optimizer states lie beside them in one of two forms:

        mp_rank_TT_model_states.pt, *_optim_states.pt    DeepSpeed's shards, one set per
                                                         tensor-parallel rank T
        state-NNNNN.safetensors                          every parameter by name, of no topology

Under tensor parallelism the names of side and method files end in `_tp_T`, and one of each is there
per rank T that shares a copy of the model.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
"""The directory of checkpoints below that of a run."""
LATEST = "latest"
TRAINER = "trainer.json"
RUN = "run.yaml"
MODEL = "model.json"
TOKENIZER = frozenset(
    ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
)
"""Names of a tokenizer's files."""
MANIFEST = "manifest.json"
STATES = "state-*.safetensors"
"""Pattern of the files that `state` names."""

_STEP = re.compile(r"step_(\d+)")
_STAGING = ".tmp"


def checkpoint(step: int) -> str:
    """Name of the checkpoint after `step` updates."""
    return f"step_{step}"


def step_of(name: str) -> int | None:
    """Updates that a checkpoint of this name holds; None if it is not the name of one."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def staging(path: Path) -> Path:
    """Where a file or a checkpoint is written before it is renamed to `path`."""
    return path.with_name(path.name + _STAGING)


def stale(path: Path) -> Path:
    """Where the checkpoint at `path` waits for its removal while another one takes its place."""
    return path.with_name(f"{path.name}.stale")


def stray(path: Path) -> Path:
    """Where something that is no checkpoint is put when one takes its name."""
    return path.with_name(f"{path.name}.stray")


def unfinished(directory: Path) -> list[Path]:
    """Checkpoints in a directory that an interrupted save never finished."""
    return sorted(directory.glob(f"step_*{_STAGING}"))


def going(directory: Path) -> list[Path]:
    """Checkpoints in a directory whose removal was not finished, or that gave way to another."""
    return sorted(directory.glob("step_*.stale"))


def state(number: int) -> str:
    """Name of one of the files that hold every parameter by name."""
    return f"state-{number:05d}.safetensors"


def is_state(name: str) -> bool:
    """Whether a file of this name holds parameters by name."""
    return fnmatch.fnmatchcase(name, STATES)


def side(suffix: str) -> str:
    """Name of the file of what DeepSpeed does not save.

    Args:
        suffix: `TensorParallel.suffix` of the rank.
    """
    return f"side{suffix}.safetensors"


def side_of_rank(rank: int) -> str:
    """Name of the file of what lies beside a global rank's slices of weights."""
    return f"side_rank_{rank}.safetensors"


def round_of_rank(rank: int) -> str:
    """Name of the file of a global rank's moments that other islands do not share, and of the
    momentum of what islands do together."""
    return f"round_rank_{rank}.safetensors"


def method(suffix: str) -> str:
    """Name of the file of the method's tensors.

    Args:
        suffix: `TensorParallel.suffix` of the rank.
    """
    return f"method{suffix}.safetensors"
