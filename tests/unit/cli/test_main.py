"""`relora-ds`: every verb is the function of its script, and mistakes are answered at once."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from relora_ds import __version__
from relora_ds.cli.main import VERBS, main
from relora_ds.cli.parser import run_tool

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = {
    "train": "launch/pretrain.py",
    "plan": "tools/plan.py",
    "prepare-data": "tools/prepare_data.py",
    "train-tokenizer": "tools/train_tokenizer.py",
    "evaluate": "tools/evaluate.py",
    "finetune": "tools/finetune.py",
    "generate": "tools/generate.py",
    "export": "tools/export_hf.py",
    "import": "tools/import_hf.py",
    "reshape": "tools/reshape_checkpoint.py",
    "doctor": "tools/doctor.py",
    "convert-flags": "tools/convert_flags.py",
    "plot": "tools/plot_run.py",
    "plot-spectrum": "tools/plot_spectrum.py",
    "report": "tools/report.py",
}


def _help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--help"])
    assert leaving.value.code == 0
    return capsys.readouterr().out


def test_every_verb_has_a_script() -> None:
    assert set(VERBS) == set(SCRIPTS)


@pytest.mark.parametrize(("verb", "script"), SCRIPTS.items())
def test_a_script_and_its_verb_take_the_same_arguments(
    verb: str,
    script: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = _help_of(capsys, verb)
    assert ours.startswith(f"usage: relora-ds {verb} ")
    assert "python tools/" not in ours
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert leaving.value.code == 0
    theirs = capsys.readouterr().out
    named = theirs.replace(f"python {script}", f"relora-ds {verb}")
    assert named.partition("\n\n")[2] == ours.partition("\n\n")[2]


def test_the_help_names_all_verbs_and_imports_none_of_their_libraries() -> None:
    heavy = ["torch", "pydantic", "rich", "numpy", "sentencepiece", "deepspeed", "matplotlib"]
    program = (
        "import sys\nfrom relora_ds.cli.main import main\n"
        "try:\n    main(['--help'])\nfinally:\n"
        f"    print('imported', sorted(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported []"
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"relora-ds {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["trian"], ["plan", "run.yaml"], ["export"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert "usage: relora-ds" in capsys.readouterr().err


def test_exit_codes_are_those_of_the_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    assert main(["train", missing]) == 2
    assert main(["plot", missing]) == 2
    text = ["--input", missing, "--output", missing]
    assert main(["train-tokenizer", *text, "--vocab-size", "400"]) == 3
    assert main(["export", "--checkpoint", missing, "--output", f"{missing}/hf"]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(missing in line for line in lines)
    # a run has ranks, so its failures name one
    assert lines[0].startswith("ROOT CAUSE rank 0 (start): ")
    assert lines[0].endswith("(exit code 2)")
    assert all(line.startswith("error: ") for line in lines[1:])


def test_ctrl_c_is_a_stop(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise KeyboardInterrupt

    assert run_tool(work) == 75
    assert capsys.readouterr().err == "stopped: what was not finished has left nothing\n"


_PRINTS = """
import sys
from relora_ds.cli.parser import run_tool
def work():
    for _ in range(int(sys.argv[1])):
        print("x" * 1000)
sys.exit(run_tool(work))
"""


@pytest.mark.parametrize("lines", [1, 1000])
def test_who_reads_the_output_may_stop_early(lines: int) -> None:
    program = [sys.executable, "-c", _PRINTS, str(lines)]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize("lines", [1, 1000])
def test_output_that_cannot_be_written_is_one_sentence(lines: int) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", _PRINTS, str(lines)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert (
        done.stderr == "error: No space left on device; free some space there, or raise the quota\n"
    )


def test_a_file_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing" / "file"
    assert run_tool(missing.touch) == 1
    said = capsys.readouterr().err
    assert said == f"error: {missing}: No such file or directory; check that file system\n"


def test_a_verb_does_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("\n\n".join(f"{word} and {word[::-1]}" for word in SCRIPTS) * 20)
    model, tokens = str(tmp_path / "tokenizer.model"), str(tmp_path / "tokens")
    arguments = ["--input", str(text), "--vocab-size", "290", "--output", model]
    assert main(["train-tokenizer", *arguments]) == 0
    arguments = ["--input", str(text), "--tokenizer", model, "--output", tokens]
    assert main(["prepare-data", *arguments]) == 0
    trained, prepared = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert prepared["tokenizer_sha256"] == trained["sha256"]
    assert (tmp_path / "tokens.bin").stat().st_size > 0


def test_a_run_needs_its_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from relora_ds.train.main import main as train

    with pytest.raises(SystemExit) as ended:
        train([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: RUN.yaml\n")
