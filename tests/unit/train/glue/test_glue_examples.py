"""Reading the tasks of GLUE, and what is said of files that are not as they must be."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds.cli.saved_model.finetune import _TASKS, main
from relora_ds.errors import ConfigError, DataError
from relora_ds.train.saved_model.glue.examples import Example, read_examples
from relora_ds.train.saved_model.glue.tasks import TASKS

# first lines as the archives of gluebenchmark.com have them, and a row that fits
FILES = {
    "cola": (None, 'gj04\t1\t\tHe said "no', 'He said "no', 1),
    "sst2": ("sentence\tlabel", "a fine film \t1", "a fine film ", 1),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "0\t1\t2\tIt rose .\tIt fell .",
        ("It rose .", "It fell ."),
        0,
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tnews\tx\t2012\t1\tn\tn\tA plane.\tAn aircraft.\t4.750",
        ("A plane.", "An aircraft."),
        4.75,
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t2\t3\tHow so?\tWhy?\t1",
        ("How so?", "Why?"),
        1,
    ),
    "mnli": (
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\tx\tIt rains.\tIt is dry.\tneutral\tcontradiction",
        ("It rains.", "It is dry."),
        2,
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tWho?\tShe.\tentailment", ("Who?", "She."), 0),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        "0\tA.\tB.\tnot_entailment",
        ("A.", "B."),
        1,
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1", ("A.", "B."), 1),
}


def write_files(folder: Path, name: str, *rows: str, head: str | None = None) -> Path:
    """The files of a task, with the same rows in every split."""
    folder.mkdir(parents=True, exist_ok=True)
    first = FILES[name][0] if head is None else head
    text = "".join(f"{line}\n" for line in (*([first] if first else []), *rows))
    for split in ("train", "dev", "dev_matched", "dev_mismatched"):
        (folder / f"{split}.tsv").write_text(text)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_task_is_read_from_its_archive(name: str, tmp_path: Path) -> None:
    _, row, texts, label = FILES[name]
    task = TASKS[name]
    write_files(tmp_path / task.table.folder, name, row)
    found = read_examples(task, str(tmp_path))
    expected = [Example((texts,) if isinstance(texts, str) else texts, label)]
    assert found.train == expected
    assert list(found.validation.values()) == [expected] * (2 if name == "mnli" else 1)


def test_the_command_knows_every_task() -> None:
    assert list(_TASKS) == list(TASKS)


def test_the_folder_of_the_task_itself_is_taken_and_cut(tmp_path: Path) -> None:
    write_files(tmp_path, "sst2", *["fine\t1"] * 5, "poor\t0")
    found = read_examples(TASKS["sst2"], str(tmp_path), limit=2)
    assert len(found.train) == len(found.validation[""]) == 2


@pytest.mark.parametrize(
    ("name", "rows", "head", "said"),
    [
        ("sst2", ["fine\t2"], None, r"train.tsv:2: wrong label: '2', but a label of sst2 is one "),
        ("sst2", ["fine\t0.5"], None, "wrong label: '0.5'"),
        ("stsb", ["\t".join("0abcdefgh") + "\t5.1"], None, "a similarity from 0 to 5"),
        ("mnli", ["0\tx\ta\tb\tneutral\t-"], None, "'-', but a label of mnli is one of entailment"),
        ("qqp", ["1\t2\t3\tHow?\tWhy?\t1", "1\t2\t3"], None, "train.tsv:3: missing column: 3 col"),
        ("rte", ["0\ta\tb\t0"], "index\tone\ttwo\tlabel", "no column 'sentence1' among 'index'"),
        ("rte", ["0\ta\tb\t0\t1"], "index\tsentence1\tsentence2\tlabel\tlabel", "has 2 columns 'l"),
        ("rte", [], None, "split train of rte holds no example"),
        ("cola", ["x\t0"], None, "missing column: 2 columns, but column 4 is read"),
    ],
)
def test_a_fault_is_named_with_its_place_and_rule(
    name: str, rows: list[str], head: str | None, said: str, tmp_path: Path
) -> None:
    write_files(tmp_path, name, *rows, head=head)
    with pytest.raises(DataError, match=said):
        read_examples(TASKS[name], str(tmp_path))


def test_rows_that_cannot_be_used_are_counted_on_request(tmp_path: Path) -> None:
    """The archive of QQP has torn rows."""
    write_files(tmp_path, "qqp", FILES["qqp"][1], "1\t2\t3", "1\t2\t3\ta\tb\tyes")
    (tmp_path / "train.tsv").write_bytes((tmp_path / "dev.tsv").read_bytes() + b"\xff\t\n")
    found = read_examples(TASKS["qqp"], str(tmp_path), on_error="skip")
    assert len(found.train) == 1
    assert found.skipped == {"missing column": 2, "wrong label": 2, "not UTF-8": 1}


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    write_files(tmp_path, "rte", "", "0\ta\tb\tentailment", "\r", "")
    assert read_examples(TASKS["rte"], str(tmp_path)).train == [Example(("a", "b"), 0)]
    write_files(tmp_path, "rte", "\t\t\t")  # a row, whose label is none
    with pytest.raises(DataError, match=r"train\.tsv:2: wrong label: ''"):
        read_examples(TASKS["rte"], str(tmp_path))


def test_a_folder_without_the_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is neither .*train.tsv nor .*RTE/train.tsv"):
        read_examples(TASKS["rte"], str(tmp_path))


def test_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the package datasets: run `pip install datasets`"):
        read_examples(TASKS["rte"], "nyu-mll/glue")


def test_a_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"sentence1": ["A."], "sentence2": ["B."], "label": [1], "idx": [0]}
    split = datasets.Dataset.from_dict(rows)
    saved = {"train": split, "validation": split}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "rte")
    found = read_examples(TASKS["rte"], str(tmp_path / "rte"))
    assert found.train == found.validation[""] == [Example(("A.", "B."), 1)]
    with pytest.raises(DataError, match="has no column 'question1' among"):
        read_examples(TASKS["qqp"], str(tmp_path / "rte"))
    with pytest.raises(DataError, match="needs the split 'validation_matched', and it has train"):
        read_examples(TASKS["mnli"], str(tmp_path / "rte"))
    test = datasets.Dataset.from_dict({**rows, "label": [-1]})
    datasets.DatasetDict({"train": test, "validation": test}).save_to_disk(tmp_path / "test")
    with pytest.raises(DataError, match="-1, but a label of rte is"):
        read_examples(TASKS["rte"], str(tmp_path / "test"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--task", "squad"],
        ["--task", "rte", "--epochs", "0"],
        ["--task", "rte", "--lr", "-1"],
        ["--task", "rte", "--seeds", "3", "3"],
    ],
)
def test_wrong_arguments_are_answered_at_once(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--checkpoint", "nowhere", *arguments])
    assert leaving.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {arguments[-2]}" in said or "--seeds 3 3 names one twice" in said
