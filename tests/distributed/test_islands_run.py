"""Runs of islands as a user starts them: killed, resumed, continued with fewer islands, refused."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.config.load import load_run_config
from relora_ds.methods.registry import plan_phases
from tests.conftest import TinyCorpus
from tests.distributed.test_resume import FIGURES, assert_same_checkpoint
from tests.harness.descriptions import describe
from tests.harness.faults import Call, Doing, Fault, Kill, Moment, Signal, plan, struck
from tests.harness.run import metrics, run, write_run

pytestmark = pytest.mark.distributed

METHOD = {
    "name": "relora",
    "rank": 4,
    "merge_every": 6,
    "restart_warmup_steps": 1,
    "warm_start_steps": 3,
}
MERGE, LAST = 9, 12
IN_BETWEEN = Moment(
    "between the common factors and the common weights",
    Call("relora_ds.engine.islands.products:MeanProducts._absorb"),
    nth=3,
)


def described(
    directory: Path,
    corpus: TinyCorpus,
    stage: int = 2,
    tensor: int = 1,
    bits: int = 8,
    adapter: str | None = "spectral",
) -> str:
    """A run of twelve updates in rounds of three on two islands: a warm start that shares
    gradients, a round of two and one of the update that is left, and one merge."""
    run = describe(
        directory,
        METHOD,
        stage,
        corpus.files,
        train={"steps": LAST},
        checkpoint={"every": 6},
        eval={"every": 6},
        parallel={"islands": 2, "tensor": tensor},
        optimizer={"adapter": adapter},
        islands={
            "every": 3,
            "from_step": 3,
            "ramp": [[6, 2]],
            "inner_lr": 1.5,
            "outer": {"lr": 0.8, "momentum": 0.5, "nesterov": True},
            "transport": {"bits": bits},
        },
    )
    return str(write_run(run, directory / "run.yaml"))


def test_a_kill_while_islands_meet_is_as_if_it_had_not_been(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = described(tmp_path, tiny_corpus)
    unbroken, broken = (f"output_dir={tmp_path / name}" for name in ("unbroken", "broken"))
    code, output = run([description, unbroken], processes=2)
    assert code == 0, output

    faults = tmp_path / "faults"
    for name, value in plan(faults, [Fault(IN_BETWEEN, rank=1, step=MERGE)]).items():
        monkeypatch.setenv(name, value)
    armed = ["launch/pretrain.py", description, broken]
    code, output = run(armed, processes=2, script="tests/faults/armed.py")
    assert (code != 0, struck(faults)) == (True, [IN_BETWEEN.name]), output
    code, output = run([description, broken], processes=2)
    assert code == 0, output
    assert "resuming from" in output

    expected, found = metrics(tmp_path / "unbroken"), metrics(tmp_path / "broken")
    assert sorted(found) == list(range(1, LAST + 1))
    assert found[MERGE]["method/event"] == "merge"
    for step, line in found.items():
        for figure in FIGURES:
            assert line.get(figure) == expected[step].get(figure), (step, figure)
    last = [tmp_path / name / "checkpoints" / f"step_{LAST}" for name in ("unbroken", "broken")]
    assert_same_checkpoint(*last)
    names = load_file(last[0] / "round_rank_1.safetensors")
    assert any(name.startswith("moments.optimizer.") for name in names)  # those of pairs
    for rank, kinds in ((0, {"momentum", "residual"}), (1, {"moments", "residual"})):
        files = [load_file(directory / f"round_rank_{rank}.safetensors") for directory in last]
        assert {name.partition(".")[0] for name in files[0]} == kinds
        for kind in kinds:
            assert any(files[0][name].any() for name in files[0] if name.startswith(kind))
        assert all(torch.equal(files[1][name], tensor) for name, tensor in files[0].items())

    config = load_run_config(description, []).config
    for phase in plan_phases(config):
        for step in range(phase.first_step, phase.last_step):
            rates = phase.learning_rates(step, config.optimizer)
            apart = 1.5 if step >= 3 else 1.0
            assert expected[step + 1]["train/lr"] == pytest.approx(apart * rates["dense"]), step

    # more islands go on from the same weights
    source, more = tmp_path / "unbroken" / "checkpoints" / "step_6", tmp_path / "more"
    overrides = [f"checkpoint.resume={source}", f"output_dir={more}", "parallel.islands=4"]
    code, output = run([description, *overrides], processes=4)
    assert code == 0, output
    lines = metrics(more)
    assert sorted(lines) == list(range(7, LAST + 1))
    assert lines[7]["train/loss"] == pytest.approx(expected[7]["train/loss"], rel=1e-6)


WITHIN_A_ROUND = Moment("within a round", Doing("micro-batch"))
ON_ARRIVAL = Moment(
    "between two fragments", Call("relora_ds.engine.islands.rounds:Rounds._outer_step", "after")
)


def in_turn(directory: Path, corpus: TinyCorpus, stage: int, bits: int) -> str:
    """A run of eighteen updates in rounds of three, of which every other one ends with common
    weights; fragments travel for two updates."""
    run = describe(
        directory,
        METHOD | {"merge_every": 9},
        stage,
        corpus.files,
        train={"steps": 18},
        checkpoint={"every": 6},
        eval={"every": 6},
        parallel={"islands": 2},
        islands={
            "every": 3,
            "outer": {"lr": 0.8, "momentum": 0.5, "nesterov": True},
            "transport": {"bits": bits, "fragments": 3, "overlap": 2},
        },
    )
    return str(write_run(run, directory / "run.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "bits"), [(1, 4), (0, 32), (3, 8)])
def test_fragments_on_their_way_survive_a_stop_and_a_kill(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, bits: int
) -> None:
    """Every other round of three updates ends with common weights: the run is asked to stop within
    one, is continued, is killed while a fragment arrives, and is continued again."""
    file = in_turn(tmp_path, tiny_corpus, stage, bits)
    unbroken, broken = (f"output_dir={tmp_path / name}" for name in ("unbroken", "broken"))
    code, output = run([file, unbroken], processes=2)
    assert code == 0, output
    ends = [
        Fault(WITHIN_A_ROUND, Signal(signal.SIGTERM), rank=1, step=8),
        Fault(ON_ARRIVAL, Kill(), rank=1, step=17),
    ]
    codes = []
    for fault in ends:
        faults = tmp_path / fault.moment.name
        for name, value in plan(faults, [fault]).items():
            monkeypatch.setenv(name, value)
        armed = ["launch/pretrain.py", file, broken]
        code, output = run(armed, processes=2, script="tests/faults/armed.py")
        assert struck(faults) == [fault.moment.name], output
        codes.append(code)
    assert (codes[0], codes[1] != 0) == (75, True)
    # asked for in update 8, agreed upon at the end of its round, and known one update later
    source = tmp_path / "broken" / "checkpoints" / "step_10"
    assert load_file(source / "round_rank_0.safetensors")["left"].tolist() == [9, -1, -1]
    code, output = run([file, broken], processes=2)
    assert (code, "step_12" in output) == (0, True), output

    expected, found = metrics(tmp_path / "unbroken"), metrics(tmp_path / "broken")
    assert sorted(found) == list(range(1, 19))
    for step, line in found.items():
        for figure in FIGURES:
            assert line.get(figure) == expected[step].get(figure), (step, figure)
    last = [tmp_path / name / "checkpoints" / "step_18" for name in ("unbroken", "broken")]
    assert_same_checkpoint(*last)

    # more islands go on as copies of the first one
    more = [f"output_dir={tmp_path / 'more'}", f"checkpoint.resume={source}", "parallel.islands=4"]
    code, output = run([file, *more], processes=4)
    assert code == 0, output
    assert sorted(metrics(tmp_path / "more")) == list(range(11, 19))


EVENTFUL = {
    "switch": {
        "name": "switchlora",
        "rank": 4,
        "interval": 8,
        "freeze_steps": 2,
        "descent_rate": 10.0,
    },
    "refresh": {"name": "galore", "rank": 4, "update_every": 6},
}
"""Methods by what they do at ends of rounds."""
EVENTS = {"switch": {3, 4, 6, 7, 10, 13, 16}, "refresh": {1, 7, 13}}


def eventful(directory: Path, corpus: TinyCorpus, kind: str, stage: int, bits: int) -> str:
    """A run of eighteen updates in rounds of two, and of three behind them; those of GaLore let
    two fragments travel."""
    transport: dict[str, int] = {"bits": bits}
    if kind == "refresh":
        transport |= {"fragments": 2, "overlap": 1}
    run = describe(
        directory,
        EVENTFUL[kind],
        stage,
        corpus.files,
        train={"steps": 18},
        optimizer={"weight_decay": 0.0},
        checkpoint={"every": 9},
        eval={"every": 9},
        parallel={"islands": 2},
        islands={
            "every": 3,
            "ramp": [[6, 2]],
            "outer": {"lr": 0.8, "momentum": 0.5, "nesterov": True},
            "transport": transport,
        },
    )
    return str(write_run(run, directory / "run.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage", "bits"),
    [("switch", 2, 8), ("switch", 3, 32), ("refresh", 1, 8), ("refresh", 3, 32)],
)
def test_events_at_the_ends_of_rounds_survive_kills(
    tiny_corpus: TinyCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    stage: int,
    bits: int,
) -> None:
    """A run is killed within a round, continued, killed within an event, and continued."""
    file = eventful(tmp_path, tiny_corpus, kind, stage, bits)
    unbroken, broken = (f"output_dir={tmp_path / name}" for name in ("unbroken", "broken"))
    code, output = run([file, unbroken], processes=2)
    assert code == 0, output
    within = Moment("within an event", Doing(kind))
    for moment, step in ((WITHIN_A_ROUND, 11), (within, 13)):
        faults = tmp_path / moment.name
        for name, value in plan(faults, [Fault(moment, Kill(), rank=1, step=step)]).items():
            monkeypatch.setenv(name, value)
        armed = ["launch/pretrain.py", file, broken]
        code, output = run(armed, processes=2, script="tests/faults/armed.py")
        assert (code != 0, struck(faults)) == (True, [moment.name]), output
    code, output = run([file, broken], processes=2)
    assert (code, "step_9" in output) == (0, True), output

    expected, found = metrics(tmp_path / "unbroken"), metrics(tmp_path / "broken")
    assert sorted(found) == list(range(1, 19))
    assert {n for n, line in found.items() if line.get("method/event") == kind} == EVENTS[kind]
    for step, line in found.items():
        for figure in (*FIGURES, "method/switched_vectors"):
            assert line.get(figure) == expected[step].get(figure), (step, figure)
    last = [tmp_path / name / "checkpoints" / "step_18" for name in ("unbroken", "broken")]
    assert_same_checkpoint(*last)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "tensor", "adapter"),
    [
        *((stage, tensor, None) for stage, tensor in ((0, 1), (3, 1), (1, 2), (0, 2))),
        *((stage, tensor, "spectral") for stage, tensor in ((3, 1), (0, 2))),
    ],
)
def test_islands_of_two_ranks_resume_bit_exact(
    tiny_corpus: TinyCorpus, tmp_path: Path, stage: int, tensor: int, adapter: str | None
) -> None:
    description = described(tmp_path, tiny_corpus, stage, tensor, bits=4, adapter=adapter)
    code, output = run([description], processes=4)
    assert code == 0, output
    source, again = tmp_path / "run" / "checkpoints" / "step_6", tmp_path / "again"
    overrides = [f"output_dir={again}", f"checkpoint.resume={source}"]
    code, output = run([description, *overrides], processes=4)
    assert code == 0, output
    expected = metrics(tmp_path / "run")
    for step, line in metrics(again).items():
        for figure in FIGURES:
            assert line.get(figure) == expected[step].get(figure), (step, figure)
    last = [path / "checkpoints" / f"step_{LAST}" for path in (tmp_path / "run", again)]
    names = sorted(path.name for path in last[0].glob("*.safetensors"))
    assert any(name.startswith("round_rank_3") or stage == 0 for name in names)
    for name in names:
        one, two = (load_file(directory / name) for directory in last)
        assert all(torch.equal(two[key], tensor) for key, tensor in one.items()), name


@pytest.mark.slow
def test_islands_of_other_sizes_go_on_before_the_first_round(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """Where gradients were shared all moments are common, and may be cut anew."""
    description = described(tmp_path, tiny_corpus, bits=32, adapter=None)
    late = ["islands.from_step=9", "islands.ramp=[]"]
    code, output = run([description, *late], processes=4)
    assert code == 0, output
    expected = metrics(tmp_path / "run")
    for step, codes in ((6, 0), (12, 4)):
        source, again = tmp_path / "run" / "checkpoints" / f"step_{step}", tmp_path / f"from_{step}"
        longer = ["train.steps=15", "checkpoint.allow_change=[train.steps]"] if codes else []
        overrides = [f"output_dir={again}", f"checkpoint.resume={source}", *late, *longer]
        code, output = run([description, *overrides], processes=2)
        assert code == codes, output
        assert ("moments of their own" in output) == (codes == 4), output
    found = metrics(tmp_path / "from_6")
    assert sorted(found) == list(range(7, LAST + 1))
    for step in range(7, 11):  # islands of other sizes have other parts of a batch
        loss = expected[step]["train/loss"]
        assert found[step]["train/loss"] == pytest.approx(loss, rel=1e-5), step


def test_what_islands_cannot_do_ends_with_two_before_anything_is_built(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    description = described(tmp_path, tiny_corpus)
    told: dict[tuple[str, int], str] = {
        ("parallel.islands=3", 1): "must be a multiple of parallel.islands (3)",
        ("checkpoint.every=4", 1): "is 4, but must be a multiple of islands.every (3)",
        ("train.seed=1", 1): "parallel.islands is 2, but must divide the copies of the model",
        (
            "method={name: galore, rank: 4}",
            2,
        ): "method.update_every: is 200, but must be",
    }
    for (override, processes), text in told.items():
        code, output = run([description, override], processes)
        assert (code, text in output) == (2, True), output
