"""The words that a failure uses for where it happened."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from relora_ds import activity


@pytest.fixture(autouse=True)
def no_step() -> Iterator[None]:
    yield
    activity.at_step(None)


def test_names_nest_and_end_with_their_blocks() -> None:
    assert activity.current() == "start"
    activity.at_step(12)
    with activity.doing("save"), activity.doing("shards"):
        assert activity.current() == "step 12: save: shards"
    assert activity.current() == "step 12: between its parts"


def test_an_error_remembers_the_innermost_block_it_left() -> None:
    activity.at_step(3)
    with pytest.raises(NotADirectoryError) as caught, activity.doing("a"), activity.doing("b"):
        raise NotADirectoryError
    assert activity.current() == "step 3: between its parts"
    assert activity.origin(caught.value) == "step 3: a: b"


def test_an_error_that_was_handled_leaves_no_trace() -> None:
    with activity.doing("export"):
        with pytest.raises(NotADirectoryError), activity.doing("tokenizer"):
            raise NotADirectoryError
        with pytest.raises(IsADirectoryError) as caught:
            raise IsADirectoryError
        assert activity.origin(caught.value) == "export"
