"""`key=value` arguments: they win over the file, and their problems name the argument."""

from __future__ import annotations

import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from relora_ds.config.load import load_run_config
from relora_ds.config.methods.lora import LoRAConfig
from relora_ds.config.methods.relora import ReLoRAConfig

ProblemsOf = Callable[..., list[str]]


def test_values_are_yaml_and_sections_appear_on_demand(run_file: Path) -> None:
    overrides = [
        "method.rank=8", "method.reset.mode=random", "eval.every=7", "log.wandb.name=on",
        "optimizer.betas=[0.9, 0.95]", "optimizer.lr=3e-4", "checkpoint.keep=null",
    ]  # fmt: skip
    config = load_run_config(run_file, overrides).config
    assert isinstance(config.method, ReLoRAConfig)
    assert (config.method.rank, config.method.reset.mode) == (8, "random")
    assert (config.eval.every, config.log.wandb.name) == (7, "on")
    assert (config.optimizer.betas, config.optimizer.lr) == ((0.9, 0.95), 3e-4)
    assert config.checkpoint.keep is None


def test_the_last_of_two_wins(run_file: Path) -> None:
    config = load_run_config(run_file, ["train.seed=1", "train.seed=2"]).config
    assert config.train.seed == 2


def test_a_whole_section_can_be_replaced(run_file: Path) -> None:
    config = load_run_config(run_file, ["method={name: lora, rank: 4}"]).config
    assert config.method == LoRAConfig(name="lora", rank=4)


def test_changing_the_method_names_the_settings_left_in_the_file(
    run_file: Path, problems_of: ProblemsOf
) -> None:
    problems = problems_of(run_file, "method.name=lora")
    assert problems[0].startswith(f"{run_file}:8: method.merge_every: belongs to method relora")


def test_a_path_from_the_home_directory_is_no_folder_called_tilde(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "zero.json").write_text("{}")
    data = "data={train: [[1.0, ~/a], [2.0, b/~/a]], valid: ~/v, tokenizer: ~t}"
    paths = ["output_dir=~/out", "deepspeed=~/zero.json", "checkpoint.resume=~/out/step_5"]
    config = load_run_config(run_file, [*paths, data, "train.init_from=~/m"]).config
    assert config.output_dir == f"{tmp_path}/out"
    assert config.deepspeed == f"{tmp_path}/zero.json"
    assert config.checkpoint.resume == f"{tmp_path}/out/step_5"
    assert config.train.init_from == f"{tmp_path}/m"
    assert config.data.train == [(1.0, f"{tmp_path}/a"), (2.0, "b/~/a")]
    assert (config.data.valid, config.data.tokenizer) == (f"{tmp_path}/v", "~t")
    for key in ("auto", True, False):
        resumed = load_run_config(run_file, [f"checkpoint.resume={str(key).lower()}"])
        assert resumed.config.checkpoint.resume == key


def test_a_path_from_a_home_that_is_not_there_is_refused(
    run_file: Path, problems_of: ProblemsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a user that has a number only, in a container."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    rule = "a whole path: this user has no home directory"
    assert problems_of(run_file, "output_dir=~/out", "checkpoint.resume=~/a") == [
        f'command line: output_dir=~/out: is "~/out", but must be {rule}',
        'command line: checkpoint.resume=~/a: is "~/a", but must be '
        f"'auto' or true or false or {rule}",
    ]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps", ("is not an override", "write key=value")),
        ("train.steps=", ("has no value", "train.steps=null")),
        ("=3", ("the key is not complete",)),
        ("train..steps=3", ("the key is not complete",)),
        ("train.steps=ten", ('is "ten"', "must be an integer")),
        ("trian.steps=3", ("trian", "did you mean `train`?")),
        ("method.rnk=3", ("unknown key", "did you mean `rank`?")),
        ("model.hidden_size=3", ("model is a single value", "write model=")),
        ("optimizer.betas=[0.9", ("is not valid YAML",)),
        ("log={every: 1, every: 2}", ("every: duplicate key",)),
        ("lr=3", ("did you mean `optimizer.lr`?",)),
        ("train.global_batch_size=6", ("is 6", "multiple of train.micro_batch_size (4)", "4 or 8")),
        ("log={evry: 1}", ("log.evry: unknown key", "`every`?")),
    ],
)
def test_problems_name_the_argument(
    run_file: Path, override: str, parts: tuple[str], problems_of: ProblemsOf
) -> None:
    problems = problems_of(run_file, override)
    assert len(problems) == 1
    assert problems[0].startswith(f"command line: {override}: ")
    for part in parts:
        assert part in problems[0]
