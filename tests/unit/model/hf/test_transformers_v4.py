"""The last release of transformers 4 loads every export, and computes and reads what we do.

It cannot stand beside the one that the other tests import: RELORA_DS_TRANSFORMERS_4 names a folder
with it and its own needs, made by

    pip install --no-deps --target FOLDER 'transformers<5' 'huggingface-hub<1' 'tokenizers<0.23' \\
        peft accelerate
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.export.hf import export_hf
from relora_ds.checkpoint.export.peft import export_peft
from relora_ds.config.model import LinearRope, ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.model.generation.sample import Sampling, generate
from relora_ds.model.hf.directory import write_hf
from relora_ds.model.llama import Llama
from tests.golden.make_checkpoint import checkpoint
from tests.unit.model.conftest import BASE, VARIANTS
from tests.unit.model.hf.test_odd_lines import TOKENIZERS, check

pytestmark = pytest.mark.slow

FOLDER = os.environ.get("RELORA_DS_TRANSFORMERS_4")
LINEAR = {"rope_scaling": LinearRope(rope_type="linear", factor=2.5)}
MODELS = {**VARIANTS, "linear": LINEAR}
TOKENS = torch.arange(36).view(2, 18) % 60
PROMPT = [5, 17, 3]
# of every folder: logits, their type, and what follows the prompt
MODELS_THERE = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import save_file

assert transformers.__version__.startswith("4."), transformers.__version__
load, found = transformers.AutoModelForCausalLM.from_pretrained, {}
asked = json.load(sys.stdin)
for name, folder in asked["folders"].items():
    folder, said = Path(folder), {}
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel
        model = PeftModel.from_pretrained(load(folder / "base"), folder)
    else:
        model, said = load(folder, output_loading_info=True, torch_dtype="auto")
    wrong = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if said.get(key)]
    assert not wrong, (name, said)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(asked["tokens"])).logits
    save_file({"logits": logits.float()}, folder.parent / f"{name}.logits")
    prompt = torch.tensor([asked["prompt"]])
    text = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    found[name] = {"dtype": str(logits.dtype), "text": text[0, prompt.numel():].tolist()}
print(json.dumps(found))
"""
TOKENIZER_THERE = """
import json, sys, transformers

assert transformers.__version__.startswith("4."), transformers.__version__
asked = json.load(sys.stdin)
tokenizer = transformers.AutoTokenizer.from_pretrained(asked["folder"])
print(json.dumps(tokenizer(asked["lines"], add_special_tokens=False)["input_ids"]))
"""


def ask(program: str, question: dict[str, Any]) -> Any:
    """What a program with transformers 4 answers; the test is skipped where that is not here."""
    if FOLDER is None:
        pytest.skip("RELORA_DS_TRANSFORMERS_4 names no folder with transformers 4")
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": FOLDER, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def theirs(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What transformers 4 computes of the models in some folders."""
    names = {name: str(folder) for name, folder in folders.items()}
    asked = {"folders": names, "tokens": TOKENS.tolist(), "prompt": PROMPT}
    return {
        name: answer | load_file(folders[name].parent / f"{name}.logits")
        for name, answer in ask(MODELS_THERE, asked).items()
    }


def test_every_architecture(tmp_path: Path, build: Callable[[ModelConfig], Llama]) -> None:
    folders, expected, texts = {}, {}, {}
    for name, changes in MODELS.items():
        config = ModelConfig(**{**BASE, **changes})
        model = build(config)
        with torch.no_grad():
            expected[name] = model.logits(TOKENS)
        texts[name] = generate(model, PROMPT, Sampling(12), ends=())
        for kind, size in (("one", 10**9), ("shards", 9000)):
            folders[f"{name}-{kind}"] = tmp_path / f"{name}-{kind}"
            weights = model.named_parameters()
            write_hf(folders[f"{name}-{kind}"], config, weights, None, torch.float32, size)
    found = theirs(folders)
    assert found.keys() == folders.keys()
    for name, answer in found.items():
        variant = name.rpartition("-")[0]
        torch.testing.assert_close(answer["logits"], expected[variant], atol=1e-5, rtol=1e-5)
        assert answer["text"] == texts[variant], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_type(
    dtype: torch.dtype, tmp_path: Path, plain: ModelConfig, build: Callable[[ModelConfig], Llama]
) -> None:
    write_hf(tmp_path / "hf", plain, build(plain).named_parameters(), None, dtype)
    assert theirs({"hf": tmp_path / "hf"})["hf"]["dtype"] == str(dtype)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_of_odd_lines(kind: str, tmp_path: Path) -> None:
    def read(exported: Path, lines: list[str]) -> list[list[int]]:
        return ask(TOKENIZER_THERE, {"folder": str(exported), "lines": lines})

    check(kind, tmp_path, 1000, read)


@pytest.mark.parametrize(("method", "number"), [("relora", 2), ("switchlora", 0)])
def test_exports_of_a_checkpoint(method: str, number: int, tmp_path: Path) -> None:
    source = checkpoint(method, number)
    export_hf(source, tmp_path / "hf", torch.float32)
    folders = {"hf": tmp_path / "hf"}
    if FOLDER is not None and Path(FOLDER, "peft").is_dir():
        export_peft(source, tmp_path / "adapter", torch.float32)
        folders["adapter"] = tmp_path / "adapter"
    train = TrainConfig(steps=1, seq_length=18, micro_batch_size=1, global_batch_size=1)
    with torch.no_grad():
        expected = DenseModel(source).model(train, torch.device("cpu")).logits(TOKENS)
    for answer in theirs(folders).values():
        torch.testing.assert_close(answer["logits"], expected, atol=1e-5, rtol=1e-5)
