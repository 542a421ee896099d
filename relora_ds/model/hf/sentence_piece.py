"""A SentencePiece model in the form that Hugging Face's tokenizers read.

Transformers can convert a `tokenizer.model` by itself, but its classes treat blanks in their own
ways, and then ids differ from those the model was trained on. So the export carries a
`tokenizer.json` that says exactly what SentencePiece does. Nothing but the `sentencepiece` package
is needed to write it.

Three differences are left. The text of a control token, such as ``</s>``, is read as that token by
Hugging Face, and as ordinary characters by SentencePiece. `normalisation` says what is left where
marks are stacked. And where a unigram model has several splits of one score, as of a run of some
dozen equal characters, SentencePiece adds scores in fp32 and Hugging Face in fp64: the pieces are
the same, in another order.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from relora_ds.errors import DataError
from relora_ds.model.hf.normalisation import NAMED, named_steps, replace

_SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE = r"<(?=0x[0-9A-F]{2}>)"
_PENALTY = 0.1  # by which SentencePiece ranks a piece of the user below its length of best pieces


class SentencePieceModel:
    """What a `tokenizer.model` says, for a conversion.

    Args:
        path: the file.

    Raises:
        DataError: it is no SentencePiece model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            proto.ParseFromString(path.read_bytes())
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, DecodeError) as error:
            raise DataError(
                f"{path} cannot be read as a SentencePiece model ({error}); "
                "train one with tools/train_tokenizer.py"
            ) from error
        self.normaliser, self.trainer = proto.normalizer_spec, proto.trainer_spec
        self.pieces: list[str] = [piece.piece for piece in proto.pieces]
        self.scores: list[float] = [piece.score for piece in proto.pieces]
        kinds = type(proto).SentencePiece
        by_kind = {
            kind: [i for i, piece in enumerate(proto.pieces) if piece.type == kind]
            for kind in (
                kinds.NORMAL,
                kinds.UNKNOWN,
                kinds.CONTROL,
                kinds.USER_DEFINED,
                kinds.UNUSED,
                kinds.BYTE,
            )
        }
        self.normal = by_kind[kinds.NORMAL]
        self.special = sorted(by_kind[kinds.UNKNOWN] + by_kind[kinds.CONTROL])
        self.user_defined = by_kind[kinds.USER_DEFINED]
        self.unused = by_kind[kinds.UNUSED]
        self.bytes = by_kind[kinds.BYTE]

    @property
    def kind(self) -> str:
        """`unigram`, `bpe`, `char` or `word`."""
        return {1: "unigram", 2: "bpe", 3: "word", 4: "char"}[self.trainer.model_type]

    def obstacles(self) -> list[str]:
        """What no `tokenizer.json` can say; empty for almost every model."""
        found = []
        if self.kind == "word":
            found.append("is a model of whole words")
        if self.normaliser.escape_whitespaces is False:
            found.append("leaves blanks as they are")
        if self.normaliser.precompiled_charsmap and self.normaliser.name not in NAMED:
            found.append("has normalisation rules of its own")
        if self.unused:
            found.append("has unused pieces")
        return found


def write_sentence_piece(model_path: Path, directory: Path) -> None:
    """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json` into `directory`.

    A model that cannot be expressed comes without a `tokenizer.json`.

    Args:
        model_path: a SentencePiece model.
        directory: exists.

    Raises:
        DataError: the file is not a SentencePiece model.
    """
    model = SentencePieceModel(model_path)
    shutil.copyfile(model_path, directory / "tokenizer.model")
    if not model.obstacles():
        _dump(_tokenizer(model), directory / "tokenizer.json")
        _dump(_tokenizer_config(model), directory / "tokenizer_config.json")


def _tokenizer(model: SentencePieceModel) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(model, i) for i in model.special],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": _pre_tokenizer(model),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": _unigram(model) if model.kind == "unigram" else _bpe(model),
    }


def _normalizers(model: SentencePieceModel) -> list[dict[str, Any]]:
    """From a text to what its pieces are looked for in."""
    spec = model.normaliser
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        steps += named_steps(spec.name)
    if spec.remove_extra_whitespaces:
        steps += [replace(r"\A +", ""), replace(rf"[ {_SPACE}]+\z", ""), replace(" {2,}", " ")]
    if spec.add_dummy_prefix:
        # `Prepend`, unlike the `Metaspace` pre-tokenizer, also acts in front of a leading space
        suffix = model.trainer.treat_whitespace_as_suffix
        steps.append(
            replace(r"(?<=[\s\S])\z", _SPACE) if suffix else {"type": "Prepend", "prepend": _SPACE}
        )
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]


def _pre_tokenizer(model: SentencePieceModel) -> dict[str, Any] | None:
    """What keeps pieces apart that the model would join, and SentencePiece does not."""
    steps = []
    if model.bytes and (model.kind == "unigram" or model.user_defined):
        # a text such as <0x0A> is not the byte that its piece stands for
        steps.append(_split(_BYTE, "MergedWithPrevious"))
    if model.user_defined and model.kind != "unigram":
        # each stands alone, the longest first, as in SentencePiece's own search
        own = sorted((model.pieces[i] for i in model.user_defined), key=len, reverse=True)
        pattern = "|".join(re.escape(piece) for piece in own)
        steps.append(_split(pattern, "Isolated"))
    return {"type": "Sequence", "pretokenizers": steps} if steps else None


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": False,
    }


def _decoders(model: SentencePieceModel) -> list[dict[str, Any]]:
    restore = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    steps = [restore, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.normaliser.add_dummy_prefix:  # a blank at the end is left, as in SentencePiece
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.processor.IdToPiece(model.processor.unk_id()),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(model.bytes),
        # a piece of the user's comes alone, and no merges lead to it
        "ignore_merges": bool(model.user_defined),
        "vocab": {piece: i for i, piece in enumerate(model.pieces)},
        "merges": _merges(model) if model.kind == "bpe" else [],
    }


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    scores = list(model.scores)
    best = max(scores[i] for i in model.normal)
    for i in model.user_defined:  # as SentencePiece ranks them while it searches
        scores[i] = len(model.pieces[i].encode()) * best - _PENALTY
    return {
        "type": "Unigram",
        "unk_id": model.processor.unk_id(),
        "vocab": [list(pair) for pair in zip(model.pieces, scores, strict=True)],
        "byte_fallback": bool(model.bytes),
    }


def _merges(model: SentencePieceModel) -> list[list[str]]:
    """Every pair of pieces that joins to a piece, in the order in which SentencePiece prefers them.

    SentencePiece stores no merges: it joins whichever neighbours form the piece of the best score.
    """
    known = {model.pieces[i] for i in model.normal}
    merges = []
    for i in sorted(model.normal, key=lambda i: model.scores[i], reverse=True):
        piece = model.pieces[i]
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [[left, right] for left, right in splits if left in known and right in known]
    return merges


def _added_token(model: SentencePieceModel, i: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": model.pieces[i], **flags, "special": True}


def _tokenizer_config(model: SentencePieceModel) -> dict[str, Any]:
    processor = model.processor
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
