"""What a method did at a step boundary, as metrics and in words."""

from __future__ import annotations

from typing import Any

from relora_ds.methods.interface import Event


def event_metrics(event: Event) -> dict[str, Any]:
    """Metrics of the line of its step."""
    return {
        "method/event": event.kind,
        "method/function_drift": event.function_drift,
        "method/moments_reset_fraction": event.moments_reset_fraction,
        **event.details,
    }


def describe_event(event: Event) -> str:
    """One line for people."""
    short = {n.removeprefix("method/").replace("_", " "): v for n, v in event.details.items()}
    details = "".join(f", {name} {value:.3g}" for name, value in short.items())
    return (
        f"{event.kind}: function drift {event.function_drift:.1e}, "
        f"{event.moments_reset_fraction:.2%} of the adapters' moments reset{details}"
    )
