"""What counts as a spike, and from when on."""

from __future__ import annotations

import pytest

from relora_ds.config.sections import LossSpikeConfig
from relora_ds.train.guards.spikes import SpikeDetector

CONFIG = LossSpikeConfig(action="skip", sigma=3.0, window=8)


def detector(count: int = 8) -> SpikeDetector:
    """Losses of 2 and 4 in turn, norms of 1: mean 3, deviation 1.07 over 8."""
    found = SpikeDetector(CONFIG)
    for number in range(count):
        found.take(2.0 + 2.0 * (number % 2), 1.0)
    return found


def test_only_what_is_beyond_sigma_deviations_of_the_mean_is_a_spike() -> None:
    spikes = detector()
    assert spikes.find(6.2, 1.0) is None  # 3 + 3 * 1.069
    assert spikes.find(6.3, 1.0) == (
        "the training loss is 6.3, more than 3 standard deviations (1.07) above the mean of the "
        "last 8 updates (3)"
    )


def test_a_gradient_norm_spikes_as_a_loss_does() -> None:
    assert "the gradient norm is 1.5" in (detector().find(3.0, 1.5) or "")


def test_falling_is_no_spike() -> None:
    assert detector().find(-50.0, 0.0) is None


@pytest.mark.parametrize(("known", "finds"), [(3, False), (4, True)])
def test_half_a_window_must_be_known(known: int, finds: bool) -> None:
    assert (detector(known).find(1e6, 1.0) is not None) is finds


def test_the_window_forgets_what_is_old() -> None:
    spikes = detector()
    for _ in range(8):
        spikes.take(100.0, 1.0)
    assert spikes.find(100.0, 1.0) is None
    assert list(spikes.losses) == [100.0] * 8


def test_a_detector_goes_on_from_what_it_remembered() -> None:
    spikes = detector()
    again = SpikeDetector(CONFIG, spikes.losses, spikes.norms)
    for loss in (5.0, 6.2, 6.3, 7.0):
        assert again.find(loss, 1.0) == spikes.find(loss, 1.0)
