"""Every configuration in the repository loads, passes its checks and resolves."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from relora_ds.accounting.flops import parameter_counts
from relora_ds.config.architecture import read_model_config
from relora_ds.config.load import LoadedRun, dump_run_config, load_run_config
from relora_ds.config.model import ModelConfig, projection_shapes
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.methods.build import meta_model
from relora_ds.methods.registry import METHODS, plan_phases
from relora_ds.planning.dry_run import dry_run
from relora_ds.train.main import main

ROOT = Path(__file__).parents[3]
RUNS = sorted((ROOT / "configs/run").glob("*.yaml"))
MODELS = sorted((ROOT / "configs/model").glob("*.json"))
LARGE = [
    path
    for path in RUNS
    if path.stem.startswith(("llama_1b", "llama_7b")) and not path.stem.endswith("single_gpu")
]
ZERO = sorted((ROOT / "configs/zero").glob("*.json"))
SIZES = (9, 20, 35, 40, 60, 71, 100, 130, 250, 350)
NAMES = {*(f"llama_{size}m" for size in SIZES), "llama_1b", "llama_3b", "llama_7b"}
# Millions of parameters with a vocabulary of 32,000
PUBLISHED = {"60m": 58.07, "130m": 134.11, "350m": 367.97, "1b": 1339.08, "7b": 6738.42}


def parameters(model: ModelConfig) -> int:
    layer = sum(rows * columns for rows, columns in projection_shapes(model).values())
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    return layer * model.num_hidden_layers + norms + 2 * model.vocab_size * model.hidden_size


# Everything that SLTrain trains and stores, with the settings of its paper
SLTRAIN = {
    "60m": 43_529_832,
    "130m": 96_545_796,
    "350m": 194_293_544,
    "1b": 645_547_960,
    "7b": 3_144_735_808,
}


@pytest.mark.parametrize(("size", "published"), SLTRAIN.items())
def test_sltrain_counts(size: str, published: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = load_run_config(f"configs/run/llama_{size}_sltrain.yaml")
    model = meta_model(run.architecture, plan_phases(run.config)[0].method, run.config.train)
    counts = parameter_counts(model)
    assert (counts.trainable, counts.frozen) == (published, 0)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = load_run_config(path.relative_to(ROOT))
    assert run.warnings == ()
    assert run.config.output_dir == f"runs/{path.stem}"
    quick = path.stem.startswith("quickstart")
    size = "llama_quickstart" if quick else "_".join(path.stem.split("_")[:2])
    assert run.config.model == f"configs/model/{size}.json"
    stage, sizes = (0, (1,)) if run.config.train.per_layer_update else (2, (1, 2))
    for dp_size in sizes:
        resolved = resolve_deepspeed_config(run.config.deepspeed, run.config, dp_size)
        assert resolved.stage == stage
    dumped = tmp_path / "run.yaml"
    dumped.write_text(dump_run_config(run.config))
    assert load_run_config(dumped).config == run.config


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_large_runs_at_every_tensor_size_and_stage(
    path: Path, tensor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for stage in (1, 2, 3):
        overrides = [f"parallel.tensor={tensor}", f"deepspeed=configs/zero/zero{stage}.json"]
        run = load_run_config(path.relative_to(ROOT), overrides)
        assert resolve_deepspeed_config(run.config.deepspeed, run.config, 2).stage == stage


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_dry_run_passes(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a command line, in this process: an import of the libraries for each takes a minute."""
    monkeypatch.chdir(ROOT)
    # theirs are the user's to prepare
    assert main([str(path.relative_to(ROOT)), "data={source: builtin}", "--dry-run"]) == 0
    assert "steps 1 to" in capsys.readouterr().out


# what an error proposes to set, and to start
_SETTING = re.compile(r"[a-z_]+\.[a-z_]+=\d+")
_START = re.compile(r"start (\d+) data-parallel processes with")


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 64])
def test_a_dry_run_on_any_number_of_processes_passes_or_says_what_to_set(
    processes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    checked: list[LoadedRun] = []
    # its tables have a test of their own and take a second each
    monkeypatch.setattr("relora_ds.planning.dry_run.dry_run", lambda run, *_: checked.append(run))

    def dry_run_on(started: str, *arguments: str) -> str:
        """What it reports; nothing where the run is valid."""
        checked.clear()
        monkeypatch.setenv("WORLD_SIZE", started)
        code = main([*arguments, "data={source: builtin}", "--dry-run"])
        assert code == (0 if checked else 2)
        return capsys.readouterr().err

    for path in RUNS:
        run = str(path.relative_to(ROOT))
        errors = dry_run_on(str(processes), run)
        if errors:
            assert len(errors.splitlines()) == 1, errors
            (setting,) = _SETTING.findall(errors)
            start = _START.search(errors)
            assert dry_run_on(start[1] if start else str(processes), run, setting) == "", errors


@pytest.mark.parametrize("name", ["llama_1b_switchlora", "llama_7b_switchlora"])
def test_a_dry_run_says_what_a_tensor_rank_holds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run = load_run_config(f"configs/run/{name}.yaml", ["parallel.tensor=8"])
    resolved = resolve_deepspeed_config(run.config.deepspeed, run.config, 1)
    text = StringIO()
    dry_run(run, resolved, Console(file=text, width=120))
    assert "one of 8 tensor ranks" in text.getvalue()


def test_a_dry_run_says_what_a_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = load_run_config("configs/run/llama_7b_sltrain_single_gpu.yaml")
    resolved = resolve_deepspeed_config(run.config.deepspeed, run.config, 1)
    text = StringIO()
    dry_run(run, resolved, Console(file=text, width=120))
    held = "GB per process: weights 6.29 + indices 0.65 + gradients 0.26 + states 6.39 = 13.59;"
    assert held in text.getvalue()


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model(path: Path) -> None:
    model = read_model_config(path)
    assert not model.tie_word_embeddings
    published = PUBLISHED.get(path.stem.removeprefix("llama_"))
    if published is not None:
        assert parameters(model) / 1e6 == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("path", ZERO, ids=lambda path: path.stem)
def test_zero(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_run_config("configs/run/quickstart.yaml").config
    resolved = resolve_deepspeed_config(path, config, 1)
    assert resolved.stage == int(path.stem.removeprefix("zero"))
    assert "auto" not in str(resolved.deepspeed)


def test_nothing_is_missing() -> None:
    assert {path.stem for path in MODELS} == NAMES | {"llama_quickstart"}
    assert {path.stem for path in ZERO} == {"zero0", "zero1", "zero2", "zero3"}
    sizes = ("60m", "130m", "350m", "1b", "7b")
    wanted = {f"llama_{size}_{method}" for size in sizes for method in METHODS}
    assert wanted <= {path.stem for path in RUNS}
