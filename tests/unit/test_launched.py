"""What a launcher says of a process is believed only if it can be true, and refused in words."""

from __future__ import annotations

import re

import pytest

from relora_ds.errors import ConfigError
from relora_ds.launched import Launched, check_meeting_place, rank_or_first, read_launch

WHOLE = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_the_place_is_what_the_launcher_says() -> None:
    assert read_launch(WHOLE) == Launched(rank=3, world_size=4, local_rank=1)
    assert read_launch({}) == Launched(rank=0, world_size=1, local_rank=0)
    check_meeting_place(WHOLE)
    assert rank_or_first(WHOLE) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "x"}, [r"RANK is 'x', but must be a whole number below WORLD_SIZE \(4\)"]),
        ({"RANK": "4"}, [r"RANK is '4', but must be a whole number below WORLD_SIZE \(4\)"]),
        ({"RANK": "-1"}, ["RANK is '-1'"]),
        ({"WORLD_SIZE": ""}, ["WORLD_SIZE is '', but must be a whole number of 1 or more"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE is '0'"]),
        ({"LOCAL_RANK": "1.0"}, [r"LOCAL_RANK is '1\.0', but must be a whole number of 0 or more"]),
        ({"RANK": "²", "WORLD_SIZE": "two"}, ["WORLD_SIZE is 'two'", "RANK is '²'"]),
        ({"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE is"]),
    ],
)
def test_what_is_no_place_is_named(changes: dict[str, str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_launch({**WHOLE, **changes})
    assert len(caught.value.problems) == len(said)
    for problem, pattern in zip(caught.value.problems, said, strict=True):
        assert re.match(pattern, problem), problem
        assert "or unset them to use one process" in problem


@pytest.mark.parametrize("name", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_of_a_launch_is_none(name: str) -> None:
    """As a scheduler's shell leaves it, which sets RANK and no more."""
    with pytest.raises(ConfigError, match=f"^RANK is 3, but {name} is missing: launchers set"):
        check_meeting_place({key: value for key, value in WHOLE.items() if key != name})


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_a_port_that_is_none_is_named(port: str) -> None:
    with pytest.raises(ConfigError, match=f"MASTER_PORT is '{port}', but must be .* from 1 to"):
        check_meeting_place({**WHOLE, "MASTER_PORT": port})


@pytest.mark.parametrize("text", ["x", "", "-1", "1e3"])
def test_whoever_has_no_rank_speaks_as_the_first(text: str) -> None:
    assert rank_or_first({"RANK": text}) == 0
