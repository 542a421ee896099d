"""A token file in two parts: documents to train on, and documents that are held out of it.

The rule knows no seed and no topology, so that every run holds out the same documents. A file is
cut at ends of documents into about a thousand stretches of equal length; the last documents of each
are held out, as many as bring the share of all tokens so far closest to the one that is asked for.
Files that were put together from several sources are thus represented from the first to the last.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence

import numpy as np

from relora_ds.data.sampler import Blend
from relora_ds.data.token_files.samples import TokenStream
from relora_ds.data.tokens import TokenFile

_STRETCHES = 1000
_RULE = "held out/1:"
"""Names the rule in fingerprints; another rule takes another number."""


class TokenPart(TokenStream):
    """Some spans of a token file, read as one stream.

    Args:
        file: where the tokens are.
        spans: first token and end of each span, ascending, without overlap.
        share: of the file's tokens that validation was to get.
        role: what became of these, in words.
    """

    def __init__(
        self, file: TokenFile, spans: Sequence[tuple[int, int]], share: float, role: str
    ) -> None:
        self.prefix = file.prefix
        self.spans = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        """First token and end of each span, int64 of shape (spans, 2)."""
        lengths = self.spans[:, 1] - self.spans[:, 0]
        self._begins = np.concatenate([[0], np.cumsum(lengths)])  # of the spans, in the stream
        self.num_tokens = int(self._begins[-1])
        self._file = file
        self._share = share
        self._role = role

    @property
    def max_token_id(self) -> int:
        """Largest id in the file."""
        return self._file.max_token_id

    def window(self, start: int, count: int) -> np.ndarray:
        """A copy of tokens `[start, start + count)` of the stream, int64 of shape (count,).

        Raises:
            IndexError: the window is not inside of the stream.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"[{start}, {start + count}) outside of {self.num_tokens} tokens")
        number = int(np.searchsorted(self._begins, start, side="right")) - 1
        pieces, end = [np.empty(0, dtype=np.int64)], start + count
        while start < end:
            stop = min(end, int(self._begins[number + 1]))
            first = int(self.spans[number, 0] + start - self._begins[number])
            pieces.append(self._file.window(first, stop - start))
            start, number = stop, number + 1
        return np.concatenate(pieces)

    def _amount(self) -> str:
        return f"data.valid_share {self._share:g} {self._role} {self.num_tokens} tokens"

    def _remedy(self) -> str:
        return (
            f"choose another share of its {self._file.num_tokens} tokens in "
            f"{self._file.num_documents} whole documents, or name a token file as data.valid"
        )


def hold_out(file: TokenFile, share: float) -> tuple[TokenPart, TokenPart]:
    """What is trained on, and what is held out; both together are the file.

    Args:
        file: where the tokens are.
        share: of its tokens that are held out, in (0, 1), met to half a document.
    """
    kept: list[tuple[int, int]] = []
    held: list[tuple[int, int]] = []
    held_tokens, begin = 0, 0
    for number in range(1, _STRETCHES + 1):
        end = _first_start(file, -(-number * file.num_tokens // _STRETCHES))
        if end <= begin:
            continue
        nearest = _nearest_start(file, end - (share * end - held_tokens))
        cut = min(end, max(begin, nearest))
        kept += [(begin, cut)] if cut > begin else []
        held += [(cut, end)] if end > cut else []
        held_tokens += end - cut
        begin = end
    return (
        TokenPart(file, kept, share, "leaves for training"),
        TokenPart(file, held, share, "holds out"),
    )


def split_fingerprint(held: Sequence[TokenPart]) -> str:
    """Identity of what is held out of some token files, whose contents are known otherwise."""
    digest = hashlib.sha256()
    for part in held:
        digest.update(len(part.spans).to_bytes(8, "little"))
        digest.update(part.spans.astype("<i8").tobytes())
    return _RULE + digest.hexdigest()


class BlendedSamples:
    """Samples of several streams, each once, in proportion to the streams' weights.

    They end where the first stream does that has too few for its weight.

    Args:
        streams: where the samples come from.
        weights: one positive weight per stream, any scale.
    """

    def __init__(self, streams: Sequence[TokenStream], weights: Sequence[float]) -> None:
        self._streams = streams
        self._blend = Blend(weights)

    @property
    def max_token_id(self) -> int:
        """No id in the streams is larger."""
        return max(stream.max_token_id for stream in self._streams)

    def num_samples(self, seq_length: int) -> int:
        """Samples of `seq_length + 1` tokens.

        Raises:
            DataError: a stream has not even one.
        """
        sizes = np.array([stream.num_samples(seq_length) for stream in self._streams])

        def is_short(count: int) -> bool:
            return bool((self._blend.uses(count) > sizes).any())

        return bisect.bisect_left(range(int(sizes.sum()) + 1), True, key=is_short) - 1

    def sample(self, number: int, seq_length: int) -> np.ndarray:
        """Sample `number`, int64 of shape (seq_length + 1,)."""
        stream, use = self._blend.locate(np.array(number))
        return self._streams[int(stream)].sample(int(use), seq_length)


def _first_start(file: TokenFile, position: int) -> int:
    """First token of the first document that begins at `position` or later; the end, for none."""
    return file.document_start(_document_at(file, position))


def _nearest_start(file: TokenFile, position: float) -> int:
    """The beginning of a document, or the end of the last, that is nearest; the later of two."""
    after = _document_at(file, position)
    later = file.document_start(after)
    earlier = file.document_start(max(0, after - 1))
    return later if later - position <= position - earlier else earlier


def _document_at(file: TokenFile, position: float) -> int:
    """Number of the first document that begins at `position` or later."""
    documents = range(file.num_documents)
    return bisect.bisect_left(documents, position, key=file.document_start)
