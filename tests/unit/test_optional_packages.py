"""Without its optional packages the project imports, and names what is missing in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from relora_ds.cli.main import VERBS, main
from tests.golden.make_checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = (
    "accelerate",
    "datasets",
    "flash_attn",
    "huggingface_hub",
    "lm_eval",
    "mlflow",
    "peft",
    "tensorboard",
    "tokenizers",
    "trackio",
    "transformers",
)
# a finder before all others that knows of none of them
BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def without_packages(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK + program]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.distributed
def test_every_module_is_imported_and_every_verb_answers() -> None:
    """In one process: the libraries take seconds to import."""
    done = without_packages(
        "import pkgutil, importlib, relora_ds\n"
        "for module in pkgutil.walk_packages(relora_ds.__path__, 'relora_ds.'):\n"
        "    if '.gpu' not in module.name:  # kernels in Triton, which CUDA builds bring along\n"
        "        importlib.import_module(module.name)\n"
        "from relora_ds.cli.main import VERBS, main\n"
        "for verb in VERBS:\n"
        "    try:\n"
        "        main([verb, '--help'])\n"
        "    except SystemExit as leaving:\n"
        "        assert leaving.code == 0, verb\n"
        f"source = {str(checkpoint('relora', 2))!r}\n"
        "from tempfile import mkdtemp\n"
        "for more in ([], ['--peft'], ['--push', 'me/model']):\n"
        "    assert main(['export', '--checkpoint', source, '--output', mkdtemp(), *more]) == 0\n"
        "assert main(['plan', 'configs/run/quickstart.yaml', '--gpus', '1']) == 0\n"
        "assert main(['plot-spectrum', '--checkpoint', source, '--output', mkdtemp() + '/s.png'])"
        " == 0\n"
    )
    assert done.returncode == 0, done.stderr
    assert all(f"usage: relora-ds {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize(
    ("module", "arguments", "package"),
    [
        ("huggingface_hub", ["export", "--push", "me/model", "--confirm"], "huggingface-hub"),
        ("lm_eval", ["evaluate", "--lm-eval", "arc_easy"], r"lm_eval[hf]"),
    ],
)
def test_what_is_missing_is_one_sentence_with_its_command(
    module: str,
    arguments: list[str],
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    more = ["--checkpoint", str(checkpoint("relora", 2))]
    more += ["--output", str(tmp_path / "hf")] if arguments[0] == "export" else []
    assert main([*arguments, *more]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"needs the package {package}" in said
    assert said.endswith(f"run `pip install {package}`")
