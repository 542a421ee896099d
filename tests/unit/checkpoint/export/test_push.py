"""An upload is described first, sent when confirmed, and never tells the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relora_ds.cli.export import main
from tests.golden.make_checkpoint import checkpoint

TOKEN = "hf_" + "s3cr3t" * 6


class FakeApi:
    """The Hub as the upload sees it; what it is asked to do is noted."""

    calls: list[tuple[str, dict[str, Any]]]
    problem: Exception | None = None

    def create_repo(self, repo: str, **how: Any) -> None:
        if self.problem is not None:
            raise self.problem
        self.calls.append((repo, how))

    def upload_folder(self, **what: Any) -> None:
        self.calls.append(("upload", what))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(FakeApi, "calls", [], raising=False)
    monkeypatch.setattr(FakeApi, "problem", None)
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(hub, "get_token", lambda: TOKEN)
    return FakeApi


def export(output: Path, *more: str) -> int:
    arguments = ["--checkpoint", str(checkpoint("relora", 2)), "--output", str(output)]
    return main([*arguments, *more])


def test_nothing_is_sent_without_confirmation(
    api: type[FakeApi], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path / "hf", "--push", "me/model") == 0
    said = capsys.readouterr().out
    assert api.calls == []
    assert "to the private model me/model" in said
    assert "model.safetensors" in said
    assert "nothing was sent" in said


def test_a_confirmed_push_sends_the_files_of_the_export(
    api: type[FakeApi], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path / "hf", "--push", "me/model", "--confirm", "--public") == 0
    (created, how), (_, sent) = api.calls
    assert (created, how["private"]) == ("me/model", False)
    assert sent["repo_id"] == "me/model"
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert set(sent["allow_patterns"]) == names
    assert "https://huggingface.co/me/model" in capsys.readouterr().out


def test_a_refusal_is_one_sentence_without_the_token(
    api: type[FakeApi], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.problem = OSError(f"401 for Bearer {TOKEN} at https://user:pw@hub\nretry later")
    assert export(tmp_path / "hf", "--push", "me/model", "--confirm") == 4
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert "user:pw" not in said.err
    assert len(said.err.splitlines()) == 1
    assert "hf auth login" in said.err
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_a_wrong_name_ends_before_anything_is_written(tmp_path: Path) -> None:
    assert export(tmp_path / "hf", "--push", "no-owner", "--confirm") == 2
    assert not (tmp_path / "hf").exists()


def test_options_of_a_push_need_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        export(tmp_path / "hf", "--confirm")
    assert caught.value.code == 2
