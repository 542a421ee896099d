"""Every way to get a run file wrong: the message names the place, the key, the value, the rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from relora_ds.config.load import load_run_config

ProblemsOf = Callable[..., list[str]]


class Case(NamedTuple):
    """`old` becomes `new`; the one problem starts at the line of `new`, and holds `parts`."""

    old: str
    new: str
    parts: tuple[str, ...]


CASES = {
    "typo": Case("merge_every: 100", "merge_evry: 100", ("method.merge_evry", "`merge_every`?")),
    "top_typo": Case(
        "schedule:\n  warmup_steps: 20", "scheduel: {}", ("scheduel: unknown key", "`schedule`?")
    ),
    "unlike_anything": Case(
        "  seq_length: 128", "  seq_length: 128\n  qqq: 1", ("train.qqq", "valid names are")
    ),
    "wrong_section": Case(
        "  mode: zero", "  mode: zero\n    lr: 1", ("did you mean `optimizer.lr`",)
    ),
    "authors_spelling": Case("  rank: 16", "  rank: 16\n  lora_r: 8", ("`method.rank`?",)),
    "megatron_spelling": Case("log:", "train-iters: 9\nlog:", ("train-iters", "`train.steps`?")),
    "other_method": Case(
        "name: relora\n  rank: 16\n  alpha: 32\n  merge_every: 100\n  restart_warmup_steps: 10\n"
        "  warm_start_steps: 50\n  reset:\n    mode: zero",
        "name: lora\n  merge_every: 100",
        ("method.merge_every: belongs to method relora", "method is lora", "remove the key"),
    ),
    "unknown_method": Case(
        "name: relora",
        "name: relorra",
        ('"relorra"', "one of full, galore, lora, low_rank, relora", "`relora`?"),
    ),
    "method_number": Case("name: relora", "name: 3", ("method.name: is 3", "one of full")),
    "text_for_integer": Case(
        "steps: 1000", "steps: many", ('train.steps: is "many"', "an integer")
    ),
    "quoted_integer": Case("steps: 1000", 'steps: "1000"', ('is "1000"', "without quotes")),
    "underscored": Case(
        "steps: 1000", "steps: 1_000", ('is "1_000"', "without quotes or underscores")
    ),
    "float_for_integer": Case("steps: 1000", "steps: 1e3", ("is 1000.0", "integer", "write 1000")),
    "boolean_for_integer": Case("steps: 1000", "steps: true", ("is true", "an integer")),
    "list_for_integer": Case("steps: 1000", "steps: [1]", ("is [1]", "an integer")),
    "yes": Case(
        "tensorboard: false", "tensorboard: yes", ('is "yes"', "YAML 1.2", "true or false")
    ),
    "one_for_true": Case("tensorboard: false", "tensorboard: 1", ("is 1", "true or false")),
    "negative": Case(
        "warmup_steps: 20", "warmup_steps: -1", ("is -1", "greater than or equal to 0")
    ),
    "zero_batch": Case("micro_batch_size: 4", "micro_batch_size: 0", ("is 0", "greater than 0")),
    "nan": Case("lr: 1e-3", "lr: .nan", ("optimizer.lr: is NaN", "finite")),
    "infinite": Case("lr: 1e-3", "lr: 1e999", ("optimizer.lr: is Infinity", "finite")),
    "huge": Case("steps: 1000", f"steps: {10**80}", ("train.steps", "64 bits")),
    "null": Case("steps: 1000", "steps:", ("train.steps: is null", "an integer", "give a value")),
    "date": Case("output_dir: runs/test", "output_dir: 2024", ("is 2024", "text", "in quotes")),
    "choice": Case("precision: bf16", "precision: fp16", ('is "fp16"', "'fp32' or 'bf16'")),
    "short_tuple": Case("[0.9, 0.999]", "[0.9]", ("optimizer.betas: is [0.9]", "entry [1]")),
    "long_tuple": Case("[0.9, 0.999]", "[0.9, 0.9, 0.9]", ("optimizer.betas", "2 entries")),
    "beta_of_one": Case("[0.9, 0.999]", "[0.9, 1.0]", ("betas[1]: is 1.0", "less than 1")),
    "union": Case("resume: auto", "resume: 3", ("is 3", "'auto' or true or false or text")),
    "blend_weight": Case(
        "train: data/train",
        "train: [[1, a], [-2, b]]",
        ("data.train[1][0]: is -2", "greater than 0"),
    ),
    "section_as_text": Case(
        "schedule:\n  warmup_steps: 20", "schedule: cosine", ("section of keys",)
    ),
    "duplicate": Case(
        "  rank: 16", "  rank: 16\n  rank: 8", ("method.rank: duplicate key", "line 6")
    ),
    "missing": Case(
        "train:\n  steps: 1000\n",
        "train:\n",
        ("train.steps: is missing", "Optimizer steps of the whole"),
    ),
    "missing_section": Case(
        "method:\n  name: relora\n  rank: 16\n  alpha: 32\n  merge_every: 100\n"
        "  restart_warmup_steps: 10\n  warm_start_steps: 50\n  reset:\n    mode: zero\n",
        "",
        ("method: is missing", "Training method"),
    ),
    "alias": Case("lr: 1e-3", "lr: &a 1e-3\n  eps: *a", ("aliases (*name) are not supported",)),
    "tag": Case("lr: 1e-3", "lr: !!python/name:os.system ''", ("the tag", "not supported")),
    "tab": Case("  rank: 16", "\trank: 16", ("not valid YAML", "spaces, not with tabs")),
    "surrogate": Case("output_dir: runs/test", r'output_dir: "\ud800"', ("half of a surrogate",)),
    "list_as_key": Case("log:", "[a]: 1\nlog:", ("a key must be text",)),
    "no_model_file": Case("model.json", "none.json", ("none.json: cannot be read (No such file",)),
    "rank": Case("rank: 16", "rank: 64", ("method.rank: is 64", "q_proj is 64 x 64", "63 or less")),
    "sequence": Case(
        "seq_length: 128", "seq_length: 512", ("is 512", "max_position_embeddings is 256")
    ),
    "batch": Case("global_batch_size: 16", "global_batch_size: 18", ("is 18", "(4)", "16 or 20")),
    "tensor": Case("log:", "parallel: {tensor: 3}\nlog:", ("parallel.tensor: is 3", "must divide")),
}
# where the marked text is not the first line of the replacement
AT_LINE = {
    "unlike_anything": "qqq", "wrong_section": "lr: 1", "authors_spelling": "lora_r",
    "other_method": "merge_every", "duplicate": "rank: 8", "alias": "*a",
}  # fmt: skip
WITHOUT_LINE = {"missing_section"}


@pytest.mark.parametrize("name", CASES)
def test_one_problem_with_place_key_value_and_rule(
    name: str, tmp_path: Path, run_text: str, problems_of: ProblemsOf
) -> None:
    case = CASES[name]
    assert case.old in run_text
    text = run_text.replace(case.old, case.new, 1)
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    problems = problems_of(path)
    assert len(problems) == 1, problems
    if name in WITHOUT_LINE:
        assert problems[0].startswith(f"{path}: ")
    else:
        marked = run_text.index(case.old) + case.new.index(AT_LINE.get(name, case.new))
        assert problems[0].startswith(f"{path}:{text.count(chr(10), 0, marked) + 1}: ")
    for part in case.parts:
        assert part in problems[0]


def test_the_unbroken_file_loads(run_file: Path) -> None:
    run = load_run_config(run_file)
    assert run.config.optimizer.lr == 1e-3
    assert run.config.optimizer.betas == (0.9, 0.999)
    assert run.warnings == ()


def test_all_problems_of_all_sources_come_in_one_report(
    tmp_path: Path, run_text: str, problems_of: ProblemsOf
) -> None:
    path = tmp_path / "bad.yaml"
    (tmp_path / "model.json").write_text('{\n"hidden_size": -1,\n"hidden_act": "gelu"}')
    text = run_text.replace("steps: 1000", "steps: soon").replace("merge_every: 100", "merge: 5")
    path.write_text(text.replace("lr: 1e-3", "lr: 1e-3\n  lr: 2e-3"))
    report = "\n".join(problems_of(path, "method.rnk=3", "log.every=", "data.source=builtin"))
    for part in (
        f"{path}:8: method.merge: unknown key",
        f"{path}:17: train.steps: is \"soon\"",
        f"{path}:24: optimizer.lr: duplicate key; first on line 23",
        f"{path}:14: data.train: is ignored with data.source builtin",
        "command line: method.rnk=3: unknown key; did you mean `rank`?",
        "command line: log.every=: has no value",
        "model.json:2: hidden_size: is -1",
        "model.json:3: hidden_act: is \"gelu\", but must be 'silu'",
        "vocab_size: is missing",
    ):  # fmt: skip
        assert part in report


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", ":1: must be a mapping"),
        (b"just text", ":1: must be a mapping"),
        (b"a: 1\nb: [1,\nc: 2\n", "is not valid YAML"),
        (b"a: 1\n---\nb: 2\n", ":2: is not valid YAML"),
        (b"a: 1\n\xff\xfe\n", ":2: is not UTF-8 text (byte 0xff)"),
        (b"a: \x00", "is not valid YAML"),
        (b"a: " + b"[" * 100, "nested more than 32 levels"),
        (b"#" * (1 << 21), "is larger than"),
    ],
)
def test_files_that_are_no_run_file(
    tmp_path: Path, content: bytes, part: str, problems_of: ProblemsOf
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    problems = problems_of(path)
    assert len(problems) == 1
    assert problems[0].startswith(str(path))
    assert part in problems[0]


def test_paths_that_are_no_file(tmp_path: Path, problems_of: ProblemsOf) -> None:
    assert "No such file" in problems_of(tmp_path / "none.yaml")[0]
    assert "is a directory" in problems_of(tmp_path)[0]
    assert "not a regular file" in problems_of(Path("/dev/null"))[0]
    assert "is not a path" in problems_of(Path("a\0b"))[0]


def test_a_broken_file_does_not_hide_broken_overrides(
    tmp_path: Path, problems_of: ProblemsOf
) -> None:
    problems = problems_of(tmp_path / "none.yaml", "steps")
    assert ["No such file" in problems[0], "not an override" in problems[1]] == [True, True]
