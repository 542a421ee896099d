"""Islands on two hosts: one of them is lost while a fragment is on a slow link."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import TinyCorpus
from tests.distributed.test_resume import FIGURES, assert_same_checkpoint
from tests.harness.descriptions import describe
from tests.harness.run import metrics, write_run
from tests.multihost.link import LOCAL, Link, Speed, missing

pytestmark = [
    pytest.mark.multihost,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

LOST, LAST = 24, 120
SLOW = Speed(bytes_per_second=1e3, delay=0.05)
"""A fragment takes seconds, and there is always one on its way or about to leave."""
METHOD = {"name": "relora", "rank": 4, "merge_every": 9, "restart_warmup_steps": 1}


def described(directory: Path, corpus: TinyCorpus) -> str:
    run = describe(
        directory,
        METHOD,
        1,
        corpus.files,
        train={"steps": LAST},
        checkpoint={"every": 6},
        eval={"every": 6},
        log={"every": 3},
        parallel={"islands": 2},
        islands={"every": 3, "transport": {"bits": 4, "fragments": 3, "overlap": 2}},
    )
    return str(write_run(run, directory / "run.yaml"))


def reached(output_dir: Path, step: int) -> bool:
    return (output_dir / "metrics.jsonl").exists() and step in metrics(output_dir)


def ended(link: Link, file: str, output_dir: Path, lost: bool = False) -> tuple[list[int], str]:
    """Exit codes of both ranks, of which the second one may be killed, and what they said."""
    logs = [output_dir.with_suffix(f".{rank}.txt") for rank in (0, 1)]
    command = [sys.executable, "-u", "launch/pretrain.py", file, f"output_dir={output_dir}"]
    outputs = [log.open("w") for log in logs]
    ranks = link.start_ranks(command, os.environ, outputs)
    try:
        while lost and not reached(output_dir, LOST) and ranks[0].poll() is None:
            time.sleep(0.05)
        if lost:
            link.speed = SLOW
            time.sleep(2.0)
            ranks[1].kill()
        codes = [rank.wait(180) for rank in ranks]
    finally:
        link.speed = LOCAL
        for rank, output in zip(ranks, outputs, strict=True):
            rank.kill()
            output.close()
    return codes, "\n".join(log.read_text() for log in logs)


def test_a_host_that_is_lost_while_a_fragment_travels_is_as_if_it_had_not_been(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    file, unbroken, broken = described(tmp_path, tiny_corpus), tmp_path / "a", tmp_path / "b"
    with Link() as link:
        codes, said = ended(link, file, unbroken)
        assert codes == [0, 0], said
        codes, said = ended(link, file, broken, lost=True)
        assert (codes[0] > 0, codes[1]) == (True, -9), said
        assert LOST <= max(metrics(broken)) < LAST, said
        codes, said = ended(link, file, broken)
        assert codes == [0, 0], said
        assert "resuming from" in said
    expected, found = metrics(unbroken), metrics(broken)
    assert sorted(found) == sorted(expected)
    for step, line in found.items():
        for figure in FIGURES:
            assert line.get(figure) == expected[step].get(figure), (step, figure)
    assert_same_checkpoint(*(path / "checkpoints" / f"step_{LAST}" for path in (unbroken, broken)))
