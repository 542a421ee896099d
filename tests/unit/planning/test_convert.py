"""Command lines of the authors' trainers become runs that load; nothing is dropped in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds.cli.main import main
from relora_ds.config.load import load_run_config
from relora_ds.config.schema import RunConfig
from relora_ds.errors import ConfigError
from relora_ds.planning.foreign.convert import convert_command
from relora_ds.planning.foreign.trainers import TRAINERS

ROOT = Path(__file__).resolve().parents[3]
MODEL = ["--model_config", "configs/model/llama_60m.json"]
BATCH = ["--batch_size", "24", "--total_batch_size", "1152", "--max_length=512"]
RELORA = [
    *("torchrun", "--nproc-per-node", "8", "torchrun_main.py", *MODEL, *BATCH),
    *("--use_peft", "True", "--relora", "1000", "--cycle_length", "1000", "--lora_r", "64"),
    *("--restart_warmup_steps", "100", "--scheduler", "cosine_restarts", "--lr", "1e-3"),
    *("--optimizer_magnitude_pruning", "0.9", "--adam_beta2", "0.95", "--workers", "8"),
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def loaded(tmp_path: Path, words: list[str]) -> tuple[RunConfig, str]:
    """The run that loads from what is printed, and the notes."""
    converted = convert_command(words)
    path = tmp_path / "run.yaml"
    path.write_text(str(converted))
    return load_run_config(path).config, "\n".join(converted.notes)


def test_relora(tmp_path: Path) -> None:
    config, notes = loaded(tmp_path, RELORA)
    method = config.method.model_dump()
    assert (method["name"], method["rank"], method["merge_every"]) == ("relora", 64, 1000)
    assert (method["reset"]["mode"], method["reset"]["fraction"]) == ("magnitude", 0.9)
    assert (config.train.global_batch_size, config.train.seq_length) == (1152, 512)
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-3, (0.9, 0.95))
    assert config.schedule.name == "cosine"
    assert "workers: batches are read from memory-mapped" in notes
    assert "reset.joint: false is theirs" in notes


def test_switchlora(tmp_path: Path) -> None:
    words = ["main.py", *MODEL, *BATCH, "--switch_lora", "--lora_rank", "128"]
    config, notes = loaded(tmp_path, [*words, "--switch_lora_interval", "20", "--lr", "0.02"])
    method = config.method.model_dump()
    assert (method["name"], method["interval"], method["freeze_steps"]) == ("switchlora", 20.0, 5)
    assert config.schedule.warmup_steps == 100
    assert "optimizer.adapter_lr" in notes


def test_sltrain_and_galore(tmp_path: Path) -> None:
    shared = ["torchrun_main.py", *MODEL, "--batch_size", "8", "--total_batch_size", "512"]
    sltrain = ["--peft_model", "sltrain", "--rank", "128", "--sp_ratio", "0.03"]
    config, _ = loaded(tmp_path, [*shared, *sltrain, "--optimizer", "adam8bit_per_layer"])
    assert config.method.model_dump()["sparsity"] == 0.03
    assert (config.optimizer.name, config.optimizer.clip) == ("adamw8bit", 0.0)
    assert config.train.per_layer_update
    galore = ["--optimizer", "galore_adamw", "--rank", "128", "--update_proj_gap", "200"]
    config, _ = loaded(tmp_path, [*shared, *galore, "--galore_scale", "0.25"])
    method = config.method.model_dump()
    assert (method["name"], method["update_every"], method["scale"]) == ("galore", 200, 0.25)


def test_axolotl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "axolotl.yml").write_text(
        "adapter: lora\nrelora: true\njagged_restart_steps: 150\nlora_r: 8\nlora_alpha: 16\n"
        "jagged_restart_warmup_steps: 10\nrelora_prune_ratio: 0.9\nmicro_batch_size: 2\n"
        "gradient_accumulation_steps: 4\nlearning_rate: 2e-4\nsequence_len: 512\n"
        "max_steps: 900\nwarmup_steps: 10\nsample_packing: true\n"
    )
    arguments = ["--axolotl", str(tmp_path / "axolotl.yml"), "--processes", "2"]
    assert main(["convert-flags", *arguments]) == 0
    text = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(text)
    config = load_run_config(tmp_path / "run.yaml").config
    method = config.method.model_dump()
    assert (method["name"], method["merge_every"]) == ("relora", 150)
    assert (method["restart_warmup_steps"], method["reset"]["fraction"]) == (10, 0.9)
    assert (config.train.global_batch_size, config.optimizer.lr) == (16, 2e-4)
    assert "# sample_packing: has no meaning here" in text


def test_tokens_become_steps(tmp_path: Path) -> None:
    config, _ = loaded(tmp_path, [*RELORA, "--max_train_tokens", "1B"])
    assert config.train.steps == 1696  # of 1152 x 512 tokens each


@pytest.mark.parametrize(("processes", "batch"), [("4", 288), ("gpu", 72), ("auto", 72), ("0", 72)])
def test_a_launcher_may_count_devices_itself(processes: str, batch: int) -> None:
    command = ["torchrun", "--nproc_per_node", processes, "main.py", "--relora", "100"]
    converted = convert_command([*command, "--batch_size", "72"])
    assert converted.run["train"]["global_batch_size"] == batch
    noted = [note for note in converted.notes if note.startswith("nproc_per_node")]
    assert noted == (
        []
        if batch == 288
        else [f"nproc_per_node {processes}: does not say how many; one process is assumed"]
    )


def test_an_unknown_flag_is_named() -> None:
    converted = convert_command([*RELORA, "--made_up", "3"])
    assert "made_up: is not known here, and is left out" in converted.notes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["main.py", "--lr", "1"], "no trainer known here"),
        (["main.py", "--relora", "1", "--peft_model", "full"], "sltrain and of relora"),
        ([*RELORA, "--relora", "often"], "relora is often, but must be a whole number"),
        ([*RELORA, "--adam_beta1", "nan"], "adam_beta1 is nan, but must be a number"),
        ([*RELORA, "--max_train_tokens", "1.2.3B"], "max_train_tokens is 1.2.3B: write a number"),
        (["main.py", "--relora", "1000"], "the flag batch_size is missing, and its trainer has no"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        convert_command(words)


def test_the_verb_takes_a_command_behind_two_dashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert-flags", "--", *RELORA]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert load_run_config(tmp_path / "run.yaml").config.method.name == "relora"


def test_a_run_that_will_not_load_is_written_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--num_training_steps", "900", "--adam_beta1", "1.5", "--keep_checkpoints", "None"]
    assert main(["convert-flags", "--", *RELORA, *flags]) == 2
    written, said = capsys.readouterr()
    (tmp_path / "run.yaml").write_text(written)
    with pytest.raises(ConfigError) as caught:
        load_run_config(tmp_path / "run.yaml")
    assert len(caught.value.problems) == 3
    for problem in caught.value.problems:  # what loading says, for the same keys
        assert f"the converted run: {problem.partition(': ')[2]}" in said


def test_files_that_are_elsewhere_do_not_keep_a_run_from_being_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert-flags", "--", *RELORA]) == 0
    assert main(["convert-flags", "--", *RELORA, "--num_training_steps", "0"]) == 2
    assert "the converted run: train.steps: is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "text", "loaded_as"),
    [
        ("save_dir", "2024", "2024"),
        ("save_dir", "no", "no"),
        ("save_dir", "a: b # c", "a: b # c"),
        ("seed", "010", 10),  # eight in YAML 1.1
        ("lr", "1e-4", 1e-4),  # and this a text
    ],
)
def test_values_are_what_they_look_like(
    tmp_path: Path, flag: str, text: str, loaded_as: object
) -> None:
    config, _ = loaded(tmp_path, [*RELORA, f"--{flag}", text])
    found = {"save_dir": config.output_dir, "seed": config.train.seed, "lr": config.optimizer.lr}
    assert found[flag] == loaded_as


def test_a_note_of_several_lines_stays_a_comment(tmp_path: Path) -> None:
    _, notes = loaded(tmp_path, [*RELORA, "--nproc-per-node", "a\nmodel: b"])
    assert "model: b" in notes


def test_nothing_to_convert_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert-flags"])
    assert caught.value.code == 2


@pytest.mark.parametrize("name", TRAINERS)
def test_a_flag_has_one_meaning(name: str) -> None:
    trainer = TRAINERS[name]
    assert not trainer.keys.keys() & trainer.dropped.keys()
    assert not trainer.derived & trainer.dropped.keys()
