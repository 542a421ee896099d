"""What a run continues from, and whether it may."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.checkpoint import resume
from relora_ds.checkpoint.changes import check_resume
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.resume import (
    choose_checkpoint,
    find_saved_run,
    phases_left,
    set_aside_earlier_run,
    state_of_other_topology,
)
from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.config.free import free_keys
from relora_ds.config.load import dump_run_config, load_run_config
from relora_ds.config.schema import RunConfig
from relora_ds.errors import CheckpointError
from relora_ds.parallel.topology import Topology
from tests.golden.make_checkpoint import ROOT, checkpoint, run_file
from tests.unit.checkpoint.conftest import Saved


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths in the golden run's description are relative to it."""
    monkeypatch.chdir(ROOT)


def continues(path: Path, *overrides: str, fingerprints: list[str] | None = None) -> None:
    """Ask whether the golden run, with some of its keys changed, may continue a checkpoint."""
    run, saved = load_run_config(run_file("relora"), overrides), SavedRun(path)
    known = saved.record.trainer.data_fingerprints
    found = known if fingerprints is None else fingerprints
    check_resume(saved, run.config, run.architecture, found)


@pytest.mark.parametrize("number", [0, 1])
def test_the_same_run_may(number: int) -> None:
    continues(checkpoint("relora", number))


FREE = (
    "output_dir=elsewhere",
    "log.every=7",
    "log.wandb.project=other",
    "checkpoint.keep=2",
    "eval.every=0",
    "train.micro_batch_size=1",
    "train.digest_every=3",
    "parallel.low_rank_plan=fold",
)


@pytest.mark.parametrize("override", FREE)
def test_what_changes_no_number_may_differ(override: str) -> None:
    key = override.partition("=")[0]
    parts = key.split(".")
    assert any(".".join(parts[:n]) in free_keys(RunConfig) for n in range(1, len(parts) + 1))
    continues(checkpoint("relora", 1), override)


def test_every_difference_is_listed() -> None:
    overrides = (
        "optimizer.lr=0.5",
        "method.rank=4",
        "output_dir=elsewhere",
        "method.reset.joint=false",
    )
    with pytest.raises(CheckpointError) as caught:
        continues(checkpoint("relora", 0), *overrides, fingerprints=["x"])
    first, *differences, remedy = str(caught.value).splitlines()
    assert first == (
        f"{checkpoint('relora', 0)}: belongs to a run that differs in method.rank, "
        "method.reset.joint, optimizer.lr, token files:"
    )
    assert [row.split() for row in differences[:-1]] == [
        ["key", "checkpoint", "run"],
        ["method.rank", "2", "4"],
        ["method.reset.joint", "True", "False"],
        ["optimizer.lr", "0.01", "0.5"],
    ]
    assert differences[-1].startswith("  token files         ['1621d33c")
    starts = {row.index(value) for row, value in zip(differences[1:4], "2T0", strict=True)}
    assert len(starts) == 1, "values stand below each other"
    assert "checkpoint.resume=false" in remedy
    assert "checkpoint.allow_change=[method.rank, method.reset.joint, optimizer.lr]" in remedy


def test_another_method_and_another_model(saved: Saved) -> None:
    with pytest.raises(CheckpointError) as caught:
        continues(checkpoint("switchlora", 0))
    first, *rest = str(caught.value).splitlines()
    assert re.search(r"differs in (method\.\w+, ){4}method\.\w+ and \d+ more:$", first)
    rows = [row.split(maxsplit=2) for row in rest]
    assert ["method.name", "'switchlora'", "'relora'"] in rows
    assert ["method.interval", "4.0", "not there"] in rows
    saved.edit(layout.MODEL, lambda data: data.update(rope_theta=500.0))
    with pytest.raises(CheckpointError, match=r"architecture\.rope_theta +500\.0"):
        continues(saved.path)


def test_a_permitted_change() -> None:
    key = "checkpoint.allow_change"
    continues(checkpoint("relora", 0), "train.steps=9", f"{key}=[train.steps]")
    continues(checkpoint("relora", 0), "schedule.warmup_steps=2", f"{key}=[schedule]")
    with pytest.raises(CheckpointError, match=r"train\.steps +8 +9"):
        continues(checkpoint("relora", 0), "train.steps=9", f"{key}=[train.seed]")


def test_keys_that_were_added_later_count_as_their_defaults(saved: Saved) -> None:
    """The oldest file that could describe the run: it has no key whose value is the default."""
    known = SavedRun(saved.path).record.config
    written = known.model_dump(mode="json", exclude_defaults=True)
    absent = ("parallel", "log.tensorboard", "train.gradient_reduction", "method.reset")
    assert not [key for key in absent if _has(written, key)]

    def forget(data: dict[str, Any]) -> None:
        data.clear()
        data.update(written)

    saved.edit(layout.RUN, forget)
    continues(saved.path)
    with pytest.raises(CheckpointError) as caught:
        continues(saved.path, "train.gradient_reduction=step")
    row = ["train.gradient_reduction", "'micro_batch'", "'step'"]
    assert [line.split() for line in str(caught.value).splitlines()[2:-1]] == [row]


def _has(data: dict[str, Any], key: str) -> bool:
    section, _, name = key.partition(".")
    return section in data and (not name or name in data[section])


def config(*overrides: str) -> RunConfig:
    return load_run_config(run_file("relora"), overrides).config


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """A run whose newest checkpoint is the golden one."""
    checkpoints = tmp_path / "run" / layout.CHECKPOINTS
    shutil.copytree(checkpoint("relora", 0), checkpoints / "step_5")
    (checkpoints / layout.LATEST).write_text("step_5")
    return tmp_path / "run"


def test_what_resume_asks_for(output_dir: Path, tmp_path: Path) -> None:
    here, nowhere = f"output_dir={output_dir}", f"output_dir={tmp_path / 'nowhere'}"
    latest = output_dir / layout.CHECKPOINTS / "step_5"
    assert choose_checkpoint(config(here)) == latest
    assert choose_checkpoint(config(here, "checkpoint.resume=true")) == latest
    assert choose_checkpoint(config(here, "checkpoint.resume=false")) is None
    assert choose_checkpoint(config(nowhere)) is None
    assert choose_checkpoint(config(nowhere, f"checkpoint.resume={output_dir}")) == latest
    for wanted in ("true", str(tmp_path)):
        with pytest.raises(CheckpointError, match=r"no checkpoint"):
            choose_checkpoint(config(nowhere, f"checkpoint.resume={wanted}"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process is all of them."""
    monkeypatch.setattr(resume, "broadcast_object", lambda value: value)
    monkeypatch.setattr(resume, "gather_objects", lambda value: [value])
    monkeypatch.setattr(resume, "rank", lambda: 0)
    monkeypatch.setattr(resume, "world_size", lambda: 1)


@pytest.mark.usefixtures("alone")
def test_a_saved_run_is_verified_before_it_is_read(output_dir: Path) -> None:
    run = config(f"output_dir={output_dir}")
    found = find_saved_run(run, is_main=True)
    assert found is not None
    assert found.record.trainer.step == 5
    assert find_saved_run(config("checkpoint.resume=false"), is_main=True) is None
    model = next((output_dir / layout.CHECKPOINTS / "step_5").glob("*model_states.pt"))
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=f"{model.name}: the content changed"):
        find_saved_run(run, is_main=True)


@pytest.fixture
def two_saved(tmp_path: Path) -> Path:
    """A run with two whole checkpoints, after 5 and 6 updates, the later one named in `latest`."""
    checkpoints = tmp_path / "run" / layout.CHECKPOINTS
    for step in (5, 6):
        path = checkpoints / f"step_{step}"
        shutil.copytree(checkpoint("relora", 1), path)
        copied = Saved(path)
        copied.edit(layout.TRAINER, lambda data, n=step: data.update(step=n, tokens=n * 64))
    (checkpoints / layout.LATEST).write_text("step_6")
    return tmp_path / "run"


def damage(path: Path) -> str:
    """Flip a bit of the model; returns the file's name."""
    model = next(path.glob("*model_states.pt"))
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    return model.name


@pytest.mark.usefixtures("alone")
def test_a_damaged_checkpoint_names_the_whole_one_before_it(two_saved: Path) -> None:
    checkpoints = two_saved / layout.CHECKPOINTS
    name = damage(checkpoints / "step_6")
    with pytest.raises(CheckpointError) as caught:
        find_saved_run(config(f"output_dir={two_saved}"), is_main=True)
    assert f"step_6/{name}: the content changed" in str(caught.value)
    assert f"checkpoint.resume={checkpoints / 'step_5'}" in str(caught.value)
    run = config(f"output_dir={two_saved}", "checkpoint.fallback=true")
    found = find_saved_run(run, is_main=True)
    assert found is not None
    assert found.checkpoint == checkpoints / "step_5"
    damage(checkpoints / "step_5")
    with pytest.raises(CheckpointError, match="no complete checkpoint is left"):
        find_saved_run(run, is_main=True)


@pytest.mark.usefixtures("alone")
def test_a_certain_checkpoint_is_never_replaced(two_saved: Path) -> None:
    wanted = two_saved / layout.CHECKPOINTS / "step_6"
    damage(wanted)
    overrides = [f"output_dir={two_saved}", f"checkpoint.resume={wanted}"]
    with pytest.raises(CheckpointError, match="the content changed"):
        find_saved_run(config(*overrides, "checkpoint.fallback=true"), is_main=True)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wanted", ["auto", "true"])
def test_a_lost_latest_never_starts_over(two_saved: Path, wanted: str) -> None:
    (two_saved / layout.CHECKPOINTS / layout.LATEST).unlink()
    overrides = [f"output_dir={two_saved}", f"checkpoint.resume={wanted}"]
    with pytest.raises(CheckpointError, match="is missing beside complete checkpoints"):
        find_saved_run(config(*overrides), is_main=True)
    found = find_saved_run(config(*overrides, "checkpoint.fallback=true"), is_main=True)
    assert found is not None
    assert found.checkpoint.name == "step_6"


@pytest.mark.usefixtures("alone")
def test_every_rank_reports_what_any_found(
    two_saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(f"output_dir={two_saved}")
    monkeypatch.setattr(resume, "gather_objects", lambda value: [value, "side: changed", "late"])
    with pytest.raises(CheckpointError, match=r"^side: changed"):
        find_saved_run(run, is_main=True)


def test_every_rank_reports_what_the_first_one_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "broadcast_object", lambda value: ("step_5: missing", None))
    with pytest.raises(CheckpointError, match="step_5: missing"):
        find_saved_run(config(), is_main=False)


def test_phases_that_are_left(saved: Saved) -> None:
    warm = config("method.warm_start_steps=6")
    assert [phase.name for phase in phases_left(warm, None)] == ["full", "relora"]
    assert [phase.name for phase in phases_left(warm, SavedRun(saved.path))] == ["relora"]
    saved.edit(layout.RUN, lambda data: data["method"].update(warm_start_steps=6))
    saved.edit(layout.TRAINER, lambda data: data.update(phase="full"))
    run = SavedRun(saved.path)
    assert [phase.name for phase in phases_left(warm, run)] == ["full", "relora"]
    with pytest.raises(CheckpointError, match="saved in the phase 'full', but the run has relora"):
        phases_left(config(), run)


def test_an_earlier_run_is_set_aside(output_dir: Path) -> None:
    (output_dir / "metrics.jsonl").touch()
    (output_dir / "notes.txt").touch()
    run = config(f"output_dir={output_dir}")
    (output_dir / "run.yaml").write_text(dump_run_config(run))
    assert set_aside_earlier_run(output_dir, run) == output_dir / "previous_1"
    assert (output_dir / "previous_1" / layout.CHECKPOINTS / "step_5").is_dir()
    assert sorted(path.name for path in output_dir.iterdir()) == ["notes.txt", "previous_1"]
    assert set_aside_earlier_run(output_dir, run) is None
    (output_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    assert set_aside_earlier_run(output_dir, run) == output_dir / "previous_2"


class Try:
    """What a run leaves that was killed before its first checkpoint."""

    def __init__(self, output_dir: Path) -> None:
        self.run = config(f"output_dir={output_dir}")
        self.checkpoints = output_dir / layout.CHECKPOINTS
        self.checkpoints.mkdir(parents=True)
        (self.checkpoints / ".probe_0").touch()
        self.output_dir = output_dir
        self.description = output_dir / "run.yaml"
        self.description.write_text(dump_run_config(self.run))
        (output_dir / "metrics.jsonl").write_text('{"step": 1}\n')

    def is_moved(self) -> bool:
        return set_aside_earlier_run(self.output_dir, self.run) is not None


def test_a_start_that_came_to_nothing_leaves_no_folder(tmp_path: Path) -> None:
    begun = Try(tmp_path / "run")
    assert not begun.is_moved()
    assert not begun.is_moved()
    begun.description.unlink()
    assert begun.is_moved()
    (begun.output_dir / "metrics.jsonl").touch()  # killed before it had described itself
    assert not begun.is_moved()
    assert (begun.output_dir / "metrics.jsonl").is_file()


@pytest.mark.parametrize(
    "change",
    [
        lambda begun: (begun.checkpoints / "step_5").mkdir(),
        lambda begun: (begun.output_dir / "hf").mkdir(),
        lambda begun: begun.description.unlink(),
        lambda begun: begun.description.write_text(begun.description.read_text() + "\n"),
        lambda begun: begun.description.write_bytes(b"\xff"),
    ],
)
def test_what_another_start_would_not_do_again_is_set_aside(
    tmp_path: Path, change: Callable[[Try], object]
) -> None:
    begun = Try(tmp_path / "run")
    change(begun)
    assert begun.is_moved()


def test_only_other_processes_or_stages_need_the_state_by_name(tmp_path: Path) -> None:
    run, device = SavedRun(checkpoint("relora", 0)), torch.device("cpu")
    one, two = Topology(0, 1, 0, device), Topology(1, 2, 1, device)
    assert state_of_other_topology(run, one, 2) is None
    for topology, stage in ((one, 3), (two, 2)):
        assert state_of_other_topology(run, topology, stage) is not None
    reshape_checkpoint(run.checkpoint, tmp_path / "reshaped")
    assert state_of_other_topology(SavedRun(tmp_path / "reshaped"), one, 2) is not None
