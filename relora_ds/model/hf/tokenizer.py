"""A SentencePiece BPE model in the form that Hugging Face's tokenizers read.

Transformers can convert a `tokenizer.model` by itself, but its LLaMA class drops the dummy prefix
in front of text that starts with a space, and then ids differ from those the model was trained on.
So the export carries a `tokenizer.json` that says exactly what SentencePiece does. Nothing but the
`sentencepiece` package is needed to write it.

One difference is left, and is meant: the text of a special token, such as ``</s>``, is read as that
token by Hugging Face and as ordinary characters by SentencePiece.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from relora_ds.errors import DataError

_SPACE = "\u2581"  # how SentencePiece writes a space
# Ligature, full-width letter, runs of spaces: whatever normalises text changes some of these.
_PROBE = " a  \ufb01\uff21 b "


def write_tokenizer(model_path: Path, directory: Path) -> None:
    """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json` into `directory`.

    Args:
        model_path: a SentencePiece model of type BPE with identity normalisation.
        directory: exists.

    Raises:
        DataError: the file is not a SentencePiece model, or of a kind that cannot be expressed.
    """
    try:
        processor = SentencePieceProcessor(model_file=str(model_path))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{model_path} cannot be read as a SentencePiece model ({error}); "
            "train one with tools/train_tokenizer.py"
        ) from error
    _check(processor, model_path)
    shutil.copyfile(model_path, directory / "tokenizer.model")
    _dump(_tokenizer(processor), directory / "tokenizer.json")
    _dump(_tokenizer_config(processor), directory / "tokenizer_config.json")


def _check(processor: SentencePieceProcessor, path: Path) -> None:
    """Reject what `_tokenizer` would translate into something else."""
    problems = []
    scores = [processor.GetScore(i) for i in _normal_ids(processor)]
    # BPE scores are merge ranks 0, -1, -2, ...; a unigram model has log probabilities, and pieces
    # that users force in share a score
    ranks = {int(score) for score in scores}
    if any(score > 0 or score != int(score) for score in scores) or len(ranks) < len(scores):
        problems.append("is not a plain BPE model")
    if processor.Normalize(_PROBE) != (_SPACE + _PROBE).replace(" ", _SPACE):
        problems.append("normalises text or adds no dummy prefix")
    if problems:
        raise DataError(
            f"{path} {' and '.join(problems)}; only BPE with identity normalisation, kept "
            "whitespace and a dummy prefix can be exported. Export without a tokenizer, or train "
            "one with tools/train_tokenizer.py"
        )


def _tokenizer(processor: SentencePieceProcessor) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    size = processor.GetPieceSize()
    byte_fallback = any(processor.IsByte(i) for i in range(size))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    restore = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(processor, i) for i in _special_ids(processor)],
        # `Prepend`, unlike the `Metaspace` pre-tokenizer, also acts in front of a leading space
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": _SPACE}, replace],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": processor.IdToPiece(processor.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "ignore_merges": False,
            "vocab": {processor.IdToPiece(i): i for i in range(size)},
            "merges": _merges(processor),
        },
    }


def _merges(processor: SentencePieceProcessor) -> list[list[str]]:
    """Every pair of pieces that joins to a piece, in the order in which SentencePiece prefers them.

    SentencePiece stores no merges: it joins whichever neighbours form the piece of the best score.
    """
    ids = _normal_ids(processor)
    known = {processor.IdToPiece(i): i for i in ids}
    merges = []
    for i in sorted(ids, key=processor.GetScore, reverse=True):
        piece = processor.IdToPiece(i)
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [[left, right] for left, right in splits if left in known and right in known]
    return merges


def _normal_ids(processor: SentencePieceProcessor) -> list[int]:
    """Ids of the pieces that merging can produce."""
    return [
        i
        for i in range(processor.GetPieceSize())
        if not (
            processor.IsControl(i)
            or processor.IsUnknown(i)
            or processor.IsByte(i)
            or processor.IsUnused(i)
        )
    ]


def _special_ids(processor: SentencePieceProcessor) -> list[int]:
    return [
        i
        for i in range(processor.GetPieceSize())
        if processor.IsControl(i) or processor.IsUnknown(i)
    ]


def _added_token(processor: SentencePieceProcessor, i: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": processor.IdToPiece(i), **flags, "special": True}


def _tokenizer_config(processor: SentencePieceProcessor) -> dict[str, Any]:
    names = {
        "unk_token": processor.unk_id(),
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
    }
    return {
        # the generic class takes tokenizer.json as it is; the LLaMA class would rebuild it
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **{key: processor.IdToPiece(i) for key, i in names.items() if i >= 0},
    }


def _dump(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
