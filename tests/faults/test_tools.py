"""Tools that are killed: what they were making is whole or absent, and is made the next time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from relora_ds.data.tokens import TokenFile
from relora_ds.errors import DataError
from tests.conftest import TinyCorpus
from tests.faults import moments as at
from tests.faults import runs
from tests.harness.faults import Call, Fault, File, Moment
from tests.harness.jobs import End, run_job, run_tool
from tests.harness.outcome import exported

pytestmark = pytest.mark.distributed

_ONLY_AGAIN = Moment("before the old index goes", File("os.remove", r"/train\.idx$"))
_PREPARATION = (
    Moment("no tokens written", Call("relora_ds.data.ingest.encode:_ids")),
    Moment("tokens written, not read back", Call("relora_ds.data.prepare:read_contents")),
    _ONLY_AGAIN,
    Moment("nothing in place", File("os.rename", r"/train\.bin$")),
    Moment("tokens in place alone", File("os.rename", r"/train\.json$")),
    Moment("all but the index in place", File("os.rename", r"/train\.idx$")),
)
_EXPORT = (
    at.EXPORT_BEGINS,
    at.IN_EXPORT,
    Moment("before the weights", Call("relora_ds.model.hf.directory:_write_weights")),
    Moment("complete, not in place", Call("relora_ds.model.hf.directory:_publish")),
    Moment("in place, not cleaned up", Call("relora_ds.model.hf.directory:_publish", "after")),
)


def _tokens(prefix: Path) -> bytes | None:
    """What a token file holds; None if it cannot be opened."""
    try:
        TokenFile(str(prefix))
    except DataError:
        return None
    return prefix.with_suffix(".bin").read_bytes()


def test_preparing_data_may_be_killed_at_any_moment(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """The first time, and over an earlier file, which held another text."""
    other = tmp_path / "other.txt"
    other.write_text(tiny_corpus.text.read_text()[::-1])
    folders = {name: tmp_path / name for name in ("earlier", "data")}

    def prepare(text: Path, folder: str, *faults: Fault) -> End:
        arguments = ["--input", str(text), "--tokenizer", str(tiny_corpus.tokenizer)]
        arguments += ["--output", str(folders[folder] / "train")]
        return run_tool("tools/prepare_data.py", arguments, *faults)

    assert prepare(other, "earlier").code == 0
    earlier, output = _tokens(folders["earlier"] / "train"), folders["data"] / "train"
    for moment in _PREPARATION:
        for again in (False, True):
            shutil.rmtree(output.parent, ignore_errors=True)
            if again:
                shutil.copytree(folders["earlier"], output.parent)
            elif moment == _ONLY_AGAIN:
                continue
            end = prepare(tiny_corpus.text, "data", Fault(moment))
            assert end.struck == [moment.name], end.said
            assert end.code != 0
            assert _tokens(output) in ((None, earlier) if again else (None,)), moment.name
    end = prepare(tiny_corpus.text, "data")
    assert end.code == 0, end.said
    assert _tokens(output) == tiny_corpus.train.with_suffix(".bin").read_bytes() != earlier
    left = {path.name for path in output.parent.iterdir()}
    assert left == {"train.bin", "train.idx", "train.json"}, "what was killed is cleaned up"


@pytest.fixture(scope="module")
def trained(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    run = runs.write("relora", tiny_corpus, tmp_path_factory.mktemp("trained"))
    end = run_job(run.arguments())
    assert end.code == 0, end.said
    return run


def test_an_export_may_be_killed_at_any_moment(trained: runs.Run, tmp_path: Path) -> None:
    """It is absent until it is complete, and an earlier one stands until the new one does."""
    output = tmp_path / "models" / "model"
    arguments = ["--checkpoint", str(trained.output_dir / "checkpoints"), "--output", str(output)]
    expected = exported(trained.output_dir / "hf")
    for again in (False, True):
        for moment in _EXPORT:
            end = run_tool("tools/export_hf.py", arguments, Fault(moment))
            assert end.struck == [moment.name], end.said
            assert end.code != 0
            assert output.exists() == (again or moment == _EXPORT[-1])
            if output.exists():
                assert exported(output) == expected
        end = run_tool("tools/export_hf.py", arguments)
        assert end.code == 0, end.said
        assert exported(output) == expected
        assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_an_export_is_told_of_a_checkpoint_that_is_not_whole(
    trained: runs.Run, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(trained.output_dir / "checkpoints", checkpoints)
    newest = checkpoints / (checkpoints / "latest").read_text()
    (newest / "manifest.json").unlink()
    arguments = ["--checkpoint", str(checkpoints), "--output", str(tmp_path / "model")]
    end = run_tool("tools/export_hf.py", arguments)
    assert end.code == 4, end.said
    assert "manifest.json" in end.said
    assert "Traceback" not in end.said
    assert not (tmp_path / "model").exists()
