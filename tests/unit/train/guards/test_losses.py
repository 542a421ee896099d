"""The loss that is reported is the mean over what is trained on."""

from __future__ import annotations

import pytest
import torch

from relora_ds.train.guards import losses
from relora_ds.train.guards.losses import Seen, Targets


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank reports a third of this one's losses, and all its positions are targets."""

    def mean(figures: torch.Tensor) -> torch.Tensor:
        other = figures / 3
        if len(figures) == 4:
            other[3] = 1.0
        return (figures + other) / 2

    monkeypatch.setattr(losses, "mean_over_ranks", mean)


def reported(share: float | None) -> float:
    seen = Seen()
    seen.note(0, torch.tensor(1.0), torch.tensor(1.0), 0.5)
    seen.note(1, torch.tensor(3.0), torch.tensor(2.0), share)
    loss, norm, problem = seen.over_ranks()
    assert (norm, problem) == (2.0, None)
    return loss


def test_positions_without_a_target_are_no_part_of_the_mean() -> None:
    targets = Targets(7)
    targets.count(torch.tensor([[7, 1, 2, 3, 7], [1, 2, 3, 4, 5]]))
    targets.count(torch.tensor([[1, 7, 7, 1, 1], [1, 2, 3, 4, 7]]))
    assert targets.share == 1 - 3 / 16
    # losses are means over 16 positions: 48 and 16 in all, over 13 and 16 targets
    assert reported(targets.share) == pytest.approx((48 + 16) / (13 + 16))


def test_every_position_is_a_target_unless_documents_are_kept_apart() -> None:
    targets = Targets(None)
    targets.count(torch.tensor([[7, 1, 2]]))
    assert targets.share is None
    assert reported(None) == 2.0
