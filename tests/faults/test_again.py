"""Steps and results that are written a second time, or at first in vain."""

from __future__ import annotations

import errno
import math
import shutil
from pathlib import Path

import pytest

from tests.conftest import TinyCorpus
from tests.faults import moments as at
from tests.faults import runs
from tests.faults.conftest import Unbroken
from tests.harness.faults import Action, Call, Fail, Fault, File, Kill, Moment, Raise, Scale
from tests.harness.jobs import run_job
from tests.harness.outcome import difference, outcome

pytestmark = pytest.mark.distributed

_LATER = "relora_ds.checkpoint.saving.retention:abandon_later"
_AGAIN = (
    Fault(Moment("the later one in place", Call(_LATER)), Kill("job")),
    Fault(Moment("before it moves", File("os.rename", r"/previous_1/checkpoints/")), Kill("job")),
    Fault(Moment("the later one aside", Call(_LATER, "after")), Kill("job")),
    Fault(at.BEFORE_RENAME, Kill("job"), step=20),
    Fault(at.BEFORE_LATEST, Kill("job"), step=20),
)


@pytest.fixture(scope="module")
def broken(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run that was killed with two checkpoints behind it."""
    run = runs.write("sltrain", tiny_corpus, tmp_path_factory.mktemp("again"))
    end = run_job(run.arguments(), Fault(at.AFTER_LINE, Kill("job"), step=22))
    assert end.struck
    return run


@pytest.mark.parametrize("fault", _AGAIN, ids=lambda fault: fault.moment.name)
def test_a_step_may_be_saved_again_and_killed_at_any_moment(
    fault: Fault, broken: runs.Run, unbroken: Unbroken, tmp_path: Path
) -> None:
    """A user went back to an earlier checkpoint; the later one of the same step moves aside."""
    copy = tmp_path / "run"
    shutil.copytree(broken.output_dir, copy)
    (copy / "checkpoints" / "latest").write_text("step_16")
    arguments = broken.arguments(f"output_dir={copy}")
    end = run_job(arguments, fault)
    assert end.struck == [fault.moment.name], end.said
    end = run_job(arguments)
    assert end.code == 0, end.said
    assert difference(outcome(copy), unbroken("sltrain")) == ""


@pytest.mark.parametrize(
    "action", [Fail(errno.ENOSPC), Raise("no fonts")], ids=["full disk", "library"]
)
def test_results_that_cannot_be_written_hide_nothing(
    action: Action, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    run = runs.write("sltrain", tiny_corpus, tmp_path)
    bad = Fault(at.AFTER_FORWARD, Scale(math.nan), rank=1, step=6)
    end = run_job(run.arguments(), bad, Fault(at.BEFORE_PLOT, action))
    assert end.code == 5, end.said
    last = end.said.rstrip().splitlines()[-1]
    assert "ROOT CAUSE rank" in last
    assert "(exit code 5)" in last


def test_an_export_that_found_no_room_is_written_by_the_same_command(
    tiny_corpus: TinyCorpus, unbroken: Unbroken, tmp_path: Path
) -> None:
    run = runs.write("sltrain", tiny_corpus, tmp_path)
    end = run_job(run.arguments(), Fault(at.IN_EXPORT, Fail(errno.ENOSPC)))
    assert end.code not in (0, 75), end.said
    assert "Traceback" not in end.said
    assert "No space left on device" in end.said
    assert not (run.output_dir / "hf").exists()
    assert run_job(run.arguments()).code == 0
    assert difference(outcome(run.output_dir), unbroken("sltrain")) == ""
