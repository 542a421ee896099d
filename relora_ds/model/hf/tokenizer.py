"""The tokenizer of an export: Hugging Face's own as it is, or a SentencePiece model in its form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from relora_ds.data.json_tokenizer import CONFIG, read_config, special_tokens
from relora_ds.data.json_tokenizer import NAME as JSON_NAME
from relora_ds.data.tokenizer import NAME, tokenizer_files
from relora_ds.model.hf.sentence_piece import SentencePieceModel, write_sentence_piece

_GENERIC = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is; others would rebuild it


def write_tokenizer(file: Path, directory: Path) -> None:
    """Write a tokenizer that `transformers.AutoTokenizer.from_pretrained(directory)` loads.

    Args:
        file: a SentencePiece model, or a `tokenizer.json` with what lies beside it.
        directory: exists.

    Raises:
        DataError: the file is damaged, or of something else.
    """
    if file.suffix.lower() != ".json":
        write_sentence_piece(file, directory)
        return
    for name, path in tokenizer_files(file).items():
        shutil.copyfile(path, directory / name)
    if (model := file.with_name(NAME)).is_file():
        shutil.copyfile(model, directory / NAME)
    config = read_config(file.with_name(CONFIG))
    config.pop("auto_map", None)
    named = {f"{kind}_token": token for kind, (token, _) in special_tokens(file).items()}
    config = {**named, **config, "tokenizer_class": _GENERIC}
    text = json.dumps(config, indent=1, ensure_ascii=False)
    (directory / CONFIG).write_text(f"{text}\n", encoding="utf-8")


def export_obstacle(file: Path) -> str | None:
    """Why an export comes without a `tokenizer.json`; None where it has one.

    Args:
        file: as for `write_tokenizer`.

    Raises:
        DataError: it is damaged, or of something else.
    """
    if file.suffix.lower() == ".json":
        return None
    problems = SentencePieceModel(file).obstacles()
    if not problems:
        return None
    return (
        f"{file} {' and '.join(problems)}, which no {JSON_NAME} can say: the export has "
        f"{NAME} alone, to be read with SentencePiece"
    )
