"""From the `data` section of a run description to token files that are ready to be read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from relora_ds.config.sections import DataConfig
from relora_ds.data.builtin import builtin_corpus, default_cache_dir
from relora_ds.data.sampler import Blend
from relora_ds.data.token_files.contents import covers_everything
from relora_ds.data.token_files.samples import Samples, TokenStream
from relora_ds.data.token_files.split import (
    BlendedSamples,
    TokenPart,
    hold_out,
    split_fingerprint,
)
from relora_ds.data.tokenizer import (
    open_tokenizer,
    special_ids,
    tokenizer_file,
    tokenizer_hash,
    tokenizers_in,
)
from relora_ds.data.tokens import TokenFile
from relora_ds.errors import ConfigError, DataError


@dataclass(frozen=True)
class Split:
    """The training files of a run, shared between training and validation."""

    kept: tuple[TokenPart, ...]
    """What is trained on, by training file."""
    held: tuple[TokenPart, ...]
    """What is held out for validation, by training file."""


@dataclass(frozen=True)
class Corpus:
    """The token files of a run."""

    train: tuple[TokenFile, ...]
    """Training data, the parts of a blend in the order of the configuration."""
    weights: tuple[float, ...]
    """Share of each training file; they sum to 1."""
    valid: TokenFile | None
    """Validation data that have a file of their own."""
    tokenizer: Path | None
    """File of the tokenizer that produced the tokens."""
    split: Split | None = None
    """How the training files are shared with validation, where it has no file of its own."""
    document_end: int | None = None
    """Id with which attention and positions end; None where documents are not kept apart."""

    @property
    def files(self) -> tuple[TokenFile, ...]:
        """Every token file, training first."""
        return self.train if self.valid is None else (*self.train, self.valid)

    @property
    def training(self) -> tuple[TokenStream, ...]:
        """What is trained on, one stream per training file."""
        return self.train if self.split is None else self.split.kept

    @property
    def validation(self) -> Samples | None:
        """What validation reads, if the run has any."""
        if self.split is None:
            return self.valid
        return BlendedSamples(self.split.held, self.weights)

    def fingerprints(self, like: Sequence[str] = ()) -> tuple[str, ...]:
        """Identity of every token file and of a split, for a check at resume.

        Args:
            like: what a checkpoint recorded; a file is named as it is there, where an earlier
                version took the ends of files for their identity.
        """
        files = tuple(
            file.ends_fingerprint()
            if number < len(like) and not covers_everything(like[number])
            else file.fingerprint
            for number, file in enumerate(self.files)
        )
        return files if self.split is None else (*files, split_fingerprint(self.split.held))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that a model with `vocab_size` ids can read every token.

        Raises:
            DataError: a file holds a larger id, or the tokenizer can produce one.
        """
        for file in self.files:
            if file.max_token_id >= vocab_size:
                at = file.first_outside(0, vocab_size)
                raise DataError(
                    f"{file.prefix}.bin: holds token id {file.max_token_id}, but the model's "
                    f"vocab_size is {vocab_size}; set vocab_size of the model to at least "
                    f"{file.max_token_id + 1} or prepare the data with a smaller tokenizer (the "
                    f"first id beyond it is token {at})"
                )
        if self.tokenizer is None:
            return
        known = open_tokenizer(self.tokenizer).vocab_size
        if known > vocab_size:
            raise DataError(
                f"{self.tokenizer}: the tokenizer has {known} ids, but the model's vocab_size is "
                f"{vocab_size}; set vocab_size of the model to at least {known} or use a smaller "
                "tokenizer"
            )

    @property
    def eos_id(self) -> int | None:
        """Id that ends every document, where tokenizer or token files say it."""
        if self.tokenizer is not None:
            return special_ids(self.tokenizer).eos
        metadata = (file.metadata for file in self.files)
        return next((each.eos_id for each in metadata if each and each.eos_id is not None), None)

    def check_tokenizer_of(self, model: Path) -> None:
        """Check that a model in a directory was trained on the ids of this corpus.

        What cannot be told, because data or model come without a tokenizer, is believed.

        Args:
            model: holds the model's tokenizer, if anything does.

        Raises:
            DataError: its tokenizer is another one.
        """
        recorded = {file.tokenizer_sha256 for file in self.files} - {None}
        theirs = tokenizers_in(model)
        if not recorded or not theirs or recorded & {tokenizer_hash(path) for path in theirs}:
            return
        if self.tokenizer is not None:
            # the same tokenizer may have been written again, or in another form
            pieces = open_tokenizer(self.tokenizer).pieces()
            if any(open_tokenizer(path).pieces() == pieces for path in theirs):
                return
        raise DataError(
            f"{self.files[0].prefix}.json: made with another tokenizer than that of the model in "
            f"{model}, so that its ids mean other texts there; prepare the data with {theirs[0]}"
        )

    def check_length(self, seq_length: int) -> None:
        """Check that every file, or part of one, holds at least one sample of `seq_length + 1`
        tokens.

        Raises:
            DataError: one is shorter.
        """
        for stream in self.training:
            stream.num_samples(seq_length)
        if self.validation is not None:
            self.validation.num_samples(seq_length)


def open_corpus(config: DataConfig) -> Corpus:
    """Open the token files that a configuration names; the builtin corpus is built if need be.

    Raises:
        ConfigError: `source: files` without a training file, or nothing says which id ends the
            documents that are to be kept apart.
        DataError: a file cannot be used, or files and tokenizer do not belong together.
    """
    if config.source == "builtin":
        cache_dir = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
        builtin = builtin_corpus(cache_dir, config.builtin_vocab_size)
        valid = TokenFile(builtin.valid_prefix)
        corpus = Corpus((TokenFile(builtin.train_prefix),), (1.0,), valid, builtin.tokenizer_path)
        return with_documents(corpus) if config.document_mask else corpus
    if not config.train:
        raise ConfigError("data.train is missing: name a token file, or set data.source to builtin")
    blend = [(1.0, config.train)] if isinstance(config.train, str) else config.train
    train = tuple(TokenFile(prefix) for _, prefix in blend)
    corpus = Corpus(
        train=train,
        weights=_shares([weight for weight, _ in blend]),
        valid=TokenFile(config.valid) if config.valid else None,
        tokenizer=tokenizer_file(config.tokenizer) if config.tokenizer else None,
        split=_split(train, config.valid_share) if config.valid_share else None,
    )
    _check_tokenizers(corpus)
    return with_documents(corpus) if config.document_mask else corpus


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    """Shares of the sum, each of which can be met.

    Raises:
        DataError: one is too small.
    """
    total = sum(weights)
    if math.isinf(total):
        weights = [weight / max(weights) for weight in weights]
        total = sum(weights)
    shares = tuple(weight / total for weight in weights)
    Blend(shares)
    return shares


def with_documents(corpus: Corpus) -> Corpus:
    """The corpus with the id that ends its documents.

    Raises:
        ConfigError: nothing says which one it is.
        DataError: a file's documents end with another one, or with none.
    """
    end = corpus.eos_id
    if end is None:
        raise ConfigError(
            "data.document_mask needs the id that ends a document, which neither data.tokenizer "
            f"nor {corpus.files[0].prefix}.json says: name the tokenizer, or prepare the data with "
            "tools/prepare_data.py"
        )
    for file in corpus.files:
        if not _holds_text(file):
            raise DataError(
                f"{file.prefix}.bin: its {file.num_documents} documents hold nothing but the token "
                "that ends them, so that data.document_mask leaves no target; use another file"
            )
        bounds = (file.document_start(n) for n in range(1, file.num_documents + 1))
        first = next(bound for bound in bounds if bound)
        for bound in (first, file.num_tokens):
            if (last := int(file.window(bound - 1, 1)[0])) != end:
                raise DataError(
                    f"{file.prefix}.bin: a document ends at token {bound - 1} with id {last} and "
                    f"not with {end}, by which data.document_mask tells documents apart; prepare "
                    "the data with tools/prepare_data.py, or set document_mask: false"
                )
    return replace(corpus, document_end=end)


def _holds_text(file: TokenFile) -> bool:
    """Whether a document has more than the token that ends it."""
    if file.num_tokens > file.num_documents:
        return True
    starts = map(file.document_start, range(file.num_documents + 1))
    return any(end - start > 1 for start, end in itertools.pairwise(starts))


def _split(train: Sequence[TokenFile], share: float) -> Split:
    parts = [hold_out(file, share) for file in train]
    return Split(tuple(kept for kept, _ in parts), tuple(held for _, held in parts))


def _check_tokenizers(corpus: Corpus) -> None:
    """All recorded tokenizers must be the same one, and the configured one if there is one."""
    known = [(f"{file.prefix}.json", file.tokenizer_sha256) for file in corpus.files]
    if corpus.tokenizer is not None:
        known.insert(0, (str(corpus.tokenizer), tokenizer_hash(corpus.tokenizer)))
    recorded = [(name, sha256) for name, sha256 in known if sha256 is not None]
    for name, sha256 in recorded[1:]:
        first_name, first_sha256 = recorded[0]
        if sha256 != first_sha256:
            raise DataError(
                f"{name}: made with tokenizer {sha256[:12]}, but {first_name} is or was made with "
                f"{first_sha256[:12]}; prepare all data with the same tokenizer and name that one"
            )
