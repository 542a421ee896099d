"""Token files: windows over documents, what is rejected, what is believed of a description."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from relora_ds.data.tokens import TokenFile
from relora_ds.errors import DataError

DOCUMENTS = [[5, 6, 7, 2], [8, 2], [9, 10, 11, 12, 2]]
FLAT = [token for document in DOCUMENTS for token in document]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_one_flat_stream(write_tokens: Callable[..., TokenFile], dtype: type) -> None:
    file = write_tokens(DOCUMENTS, dtype=dtype)
    assert (file.num_tokens, file.num_documents, file.max_token_id) == (11, 3, 12)
    for start in range(12):
        for count in range(12 - start):
            window = file.window(start, count)
            assert window.dtype == np.int64
            assert window.tolist() == FLAT[start : start + count]


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 12), (11, 1), (3, -1)])
def test_window_stays_inside(
    write_tokens: Callable[..., TokenFile], start: int, count: int
) -> None:
    with pytest.raises(IndexError, match="outside of 11 tokens"):
        write_tokens(DOCUMENTS).window(start, count)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_prefix_or_file_name(write_tokens: Callable[..., TokenFile], suffix: str) -> None:
    prefix = write_tokens(DOCUMENTS).prefix
    assert TokenFile(prefix + suffix).prefix == prefix


def test_fingerprint_follows_the_contents(write_tokens: Callable[..., TokenFile]) -> None:
    file = write_tokens(DOCUMENTS)
    assert file.fingerprint == write_tokens(DOCUMENTS, "copy").fingerprint
    assert file.fingerprint != write_tokens([[5, 6, 8, 2], *DOCUMENTS[1:]], "other").fingerprint
    assert file.fingerprint != write_tokens([FLAT], "joined").fingerprint


def test_ids_of_32_bits(write_tokens: Callable[..., TokenFile]) -> None:
    assert write_tokens([[1, 70000, 2]], dtype=np.int32).max_token_id == 70000
    with pytest.raises(DataError, match="token 1 has a negative id"):
        _ = write_tokens([[1, -3, 2]], "negative", dtype=np.int32).max_token_id


class Files:
    """The two files of a token file, to be damaged."""

    def __init__(self, prefix: str) -> None:
        self.bin = Path(f"{prefix}.bin")
        self.idx = Path(f"{prefix}.idx")

    def patch_idx(self, offset: int, data: bytes) -> None:
        content = self.idx.read_bytes()
        self.idx.write_bytes(content[:offset] + data + content[offset + len(data) :])

    def resize(self, path: Path, change: int) -> None:
        content = path.read_bytes() + bytes(max(change, 0))
        path.write_bytes(content[: len(content) + min(change, 0)])


HEADER, LENGTHS, POINTERS = 34, 3 * 4, 3 * 8
DAMAGES: dict[str, tuple[Callable[[Files], object], str]] = {
    "no .bin": (lambda f: f.bin.unlink(), "bin: cannot be read: No such file"),
    "no .idx": (lambda f: f.idx.unlink(), "idx: cannot be read: No such file"),
    "empty .idx": (lambda f: f.idx.write_bytes(b""), "0 bytes are no index"),
    "empty .bin": (lambda f: f.bin.write_bytes(b""), "holds no tokens"),
    "text .idx": (lambda f: f.idx.write_text("x" * 99), "not an index of a Megatron"),
    "short .idx": (lambda f: f.resize(f.idx, -3), "99 bytes, but 3 sequences take 102"),
    "long .idx": (lambda f: f.resize(f.idx, 3), "105 bytes, but 3 sequences take 102"),
    "short .bin": (lambda f: f.resize(f.bin, -2), "20 bytes, but the index describes 22"),
    "long .bin": (lambda f: f.resize(f.bin, 2), "24 bytes, but the index describes 22"),
    "version": (lambda f: f.patch_idx(9, b"\x02"), "not an index of .* version 1"),
    "type code": (lambda f: f.patch_idx(17, b"\x63"), "unknown type code 99"),
    "float type": (lambda f: f.patch_idx(17, b"\x07"), "float32 are not integers"),
    "length": (lambda f: f.patch_idx(HEADER, b"\x03"), "sequence 1 does not follow"),
    "negative": (lambda f: f.patch_idx(HEADER, b"\xff" * 4), "sequence 0 does not follow"),
    "bounds": (lambda f: f.patch_idx(HEADER + LENGTHS + POINTERS + 24, b"\x09"), "document bounds"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(write_tokens: Callable[..., TokenFile], name: str) -> None:
    prefix = write_tokens(DOCUMENTS).prefix
    damage, message = DAMAGES[name]
    damage(Files(prefix))
    with pytest.raises(DataError, match=message):
        TokenFile(prefix)


FOREIGN = {
    "no JSON": "not json",
    "another object": json.dumps({"num_tokens": 5}),
    "a list": "[1, 2]",
    "empty": "",
    "nested without end": "[" * 100_000,
    "a long key": json.dumps({"x" * 100_000: 1}),
    "binary": "\0\1\2",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_description_is_refused(
    write_tokens: Callable[..., TokenFile], name: str
) -> None:
    prefix = write_tokens(DOCUMENTS).prefix
    Path(f"{prefix}.json").write_text(FOREIGN[name])
    with pytest.raises(
        DataError, match=r"tokens\.json: is not what .* move this \.json away"
    ) as error:
        TokenFile(prefix)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "/"])
def test_pipes_and_devices_are_not_opened(
    write_tokens: Callable[..., TokenFile], tmp_path: Path, suffix: str, target: str
) -> None:
    prefix = write_tokens(DOCUMENTS).prefix
    os.mkfifo(tmp_path / "pipe")
    path = Path(prefix + suffix)
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=rf"tokens\{suffix}: cannot be read: it is a"):
        TokenFile(prefix)


def test_an_impossible_name_is_refused() -> None:
    with pytest.raises(DataError, match=r"cannot be read: no file can have this name"):
        TokenFile("data/\0tokens")
