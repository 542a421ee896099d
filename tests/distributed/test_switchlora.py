"""SwitchLoRA on two ranks at every ZeRO stage equals plain single-process PyTorch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import switchlora
from tests.harness.build import STAGES
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("switchlora")
    return run_ranks(switchlora.figures, 2, 580.0, directory=directory)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_equal_the_reference(figures: dict[str, Any], stage: int) -> None:
    found, reference = figures[f"fp32/{stage}"], figures["reference"]
    assert len(found["losses"]) >= 200
    assert reference["switched"] > 1000
    assert found["difference"] <= 1e-6
    assert found["replicas"] == 0.0
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-6)
    assert found["norms"] == pytest.approx(reference["norms"], rel=1e-5)
    assert min(found["norms"]) > 0.05, "clipping was meant to be active on every step"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_switches_keep_the_function(figures: dict[str, Any], precision: str, stage: int) -> None:
    found = figures[f"{precision}/{stage}"]
    assert found["replicas"] == 0.0
    assert found["drifts"]
    assert all(0.0 < drift <= 1e-6 for drift in found["drifts"])


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_with_a_residual_drifts_as_little_as_fp32(figures: dict[str, Any], stage: int) -> None:
    found = figures[f"bf16/{stage}"]["untrained"]
    assert found["events"] == 40
    # on the authoritative weight, with the factors that the forward pass uses
    assert 0.0 < found["largest"] <= 1e-6
    assert found["total"] <= 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_vectors_keep_their_bits(figures: dict[str, Any], stage: int) -> None:
    assert figures[f"fp32/{stage}"]["moved"] == 0
    assert figures[f"bf16/{stage}"]["moved"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_one_changed_bit_of_what_switches_edit_is_found(
    figures: dict[str, Any], stage: int
) -> None:
    found = figures[f"bf16/{stage}"]["digest"]
    # weight and residual, two factors with their clocks; slots and places of both pools
    assert len(found) >= 10
    assert any("candidates" in name for name in found) is (stage < 3)  # cut: no second copy
    for name, message in found.items():
        shown = name.removesuffix(" (low)") if stage == 3 else name
        assert message.startswith(("rank 1 disagrees", "rank 0, 1 disagrees")), message
        assert f"others on {shown}, or with itself, after a switch:" in message


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_bit_identical_with_frozen_vectors_pending(
    figures: dict[str, Any], stage: int
) -> None:
    found = figures[f"resume/{stage}"]
    assert found["pending"] > 0
    assert found["same_losses"]
    assert found["same_weights"]


def test_switches_move_no_byte_unless_weights_are_cut(figures: dict[str, Any]) -> None:
    for stage in STAGES[:3]:
        assert figures[f"fp32/{stage}"]["event_bytes"] == 0
    found = figures["fp32/3"]
    # one exchange per event: per switched pair 3 rows of A and 3 columns of B, which are 12 to 40
    # elements long here, of 4 bytes
    pairs = figures["reference"]["switched"] / 2
    assert 0 < found["event_bytes"] <= pairs * 3 * (24 + 40) * 4


def test_stages_make_the_same_choices(figures: dict[str, Any]) -> None:
    for key in ("switched_vectors", "candidates_visited", "candidate_pairs"):
        values = {figures[f"fp32/{stage}"]["figures"][f"method/{key}"] for stage in STAGES}
        assert len(values) == 1


def test_two_ranks_of_a_node_share_the_pool(figures: dict[str, Any]) -> None:
    sizes = [figures[f"fp32/{stage}"]["figures"]["method/host_bytes_per_node"] for stage in STAGES]
    assert sizes[0] == sizes[1] == sizes[2] > 0
    assert figures["bf16/1"]["figures"]["method/host_bytes_per_node"] == 0
