"""ReLoRA on two ranks at ZeRO 0 to 3 equals plain single-process PyTorch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import relora
from tests.harness.build import STAGES
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed

JOINT = ("zero", "random", "magnitude", "zero_keep_steps")
WORLD_SIZE = 2


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return run_ranks(relora.figures, WORLD_SIZE)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", JOINT)
def test_parameters_equal_the_reference(figures: dict[str, Any], mode: str, stage: int) -> None:
    found = figures[f"{mode}/{stage}"]
    assert found["difference"] <= 1e-6
    assert found["replicas"] == 0.0
    assert found["losses"] == pytest.approx(found["reference_losses"], rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_the_published_separate_masks_are_available(figures: dict[str, Any], stage: int) -> None:
    # first moments without second ones divide by eps: rounding is amplified a thousandfold
    assert figures[f"magnitude_separate/{stage}"]["difference"] <= 1e-4
    assert figures[f"magnitude_separate/{stage}"]["losses"] == pytest.approx(
        figures[f"magnitude_separate/{stage}"]["reference_losses"], rel=1e-6
    )


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_norm_is_the_global_one_before_clipping(
    figures: dict[str, Any], stage: int
) -> None:
    found = figures[f"zero/{stage}"]
    assert found["norms"] == pytest.approx(found["reference_norms"], rel=1e-5)
    assert min(found["norms"]) > 0.3, "clipping was meant to be active on every step"


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_holds_two_elements_per_trained_parameter(
    figures: dict[str, Any], stage: int
) -> None:
    found = figures[f"zero/{stage}"]
    copies = WORLD_SIZE if stage == 0 else 1
    # stage 3 pads every parameter to the number of ranks
    assert 0 <= found["state_elements"] - copies * 2 * found["trained"] <= (stage == 3) * 200


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", JOINT)
def test_merges_keep_the_function_and_tame_the_update(
    figures: dict[str, Any], mode: str, stage: int
) -> None:
    found = figures[f"{mode}/{stage}"]
    assert [event["step"] for event in found["events"]] == [4, 8, 12]
    assert all(event["kind"] == "merge" for event in found["events"])
    assert all(event["function_drift"] <= 1e-6 for event in found["events"])
    assert all(event["details"]["method/output_drift"] <= 1e-6 for event in found["events"])
    assert found["b_after"] == [0.0, 0.0, 0.0]
    assert max(found["ratios"]) <= 10.0


def test_share_of_reset_moments_does_not_depend_on_the_stage(figures: dict[str, Any]) -> None:
    expected = {"zero": (1.0, 1.0), "random": (0.87, 0.93), "magnitude": (0.8, 1.0)}
    for mode, (low, high) in expected.items():
        shares = [
            [event["moments_reset_fraction"] for event in figures[f"{mode}/{stage}"]["events"]]
            for stage in STAGES
        ]
        assert shares[0] == shares[1] == shares[2]
        assert all(low <= share <= high for share in shares[0])


def test_bf16_keeps_merges_exact(figures: dict[str, Any]) -> None:
    for stage in STAGES:
        found = figures[f"bf16/{stage}"]
        assert found["replicas"] == 0.0
        # on the authoritative weight, bf16 plus residual
        assert all(event["function_drift"] <= 1e-6 for event in found["events"])
        assert all(event["details"]["method/lost_update"] <= 1e-4 for event in found["events"])
        assert found["losses"] == pytest.approx(figures["zero/0"]["losses"], rel=2e-2)
    # stage 2 reduces every micro-batch and rounds its gradients to bf16 once more
    assert figures["bf16/0"]["losses"] == figures["bf16/1"]["losses"]
    assert figures["bf16/3"]["losses"] == figures["bf16/2"]["losses"]
    assert figures["bf16/2"]["losses"] == pytest.approx(figures["bf16/1"]["losses"], rel=2e-3)
