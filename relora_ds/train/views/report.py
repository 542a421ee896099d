"""One page about a run that needs nothing beside itself: no network, no script, no other file."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from relora_ds.config.reading.source import read_yaml
from relora_ds.errors import ConfigError, ReloraError
from relora_ds.files.objects import read_object
from relora_ds.redaction import redact
from relora_ds.train.telemetry.atomic import write_atomically
from relora_ds.train.telemetry.plot import has_losses, loss_figure
from relora_ds.train.views.curves import Curves, draw_curves, read_curves
from relora_ds.train.views.figures import as_svg, new_figure
from relora_ds.train.views.spectrum import draw_spectra, spectra

_EVENTS_SHOWN = 200
_PANELS = (
    ("Throughput", ("throughput/tokens_per_second", "throughput/mfu")),
    ("Memory", ("memory/max_allocated_bytes", "memory/host_bytes")),
    ("Wire", ("communication/bytes_per_step", "communication/wire_bytes_per_step")),
    ("Rates", ("train/lr", "train/adapter_lr", "train/grad_norm")),
)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem} h2{font-size:1.2rem;margin-top:2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-size:13px} td,th{padding:2px 10px 2px 0;text-align:left}
td{border-top:1px solid #eee;vertical-align:top;overflow-wrap:anywhere}
svg{max-width:100%;height:auto} .scroll{overflow-x:auto} pre{font-size:12px;overflow-x:auto}
"""


def write_report(run: Path, output: Path, with_spectra: bool = False) -> Path:
    """Write the page of a run, finished or not.

    Args:
        run: its output_dir.
        output: the page; replaced in one step.
        with_spectra: read the latest checkpoint as well, and show what training added to it.

    Returns:
        `output`.

    Raises:
        ConfigError: the run has reported nothing, or the page cannot be written.
        CheckpointError: there is no checkpoint to read spectra from.
    """
    curves = read_curves(run)
    page = "".join(_page(run, curves, with_spectra))
    try:
        write_atomically(output, page.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from error
    return output


def _page(run: Path, curves: Curves, with_spectra: bool) -> Iterator[str]:
    summary, name = read_object(run / "summary.json") or {}, html.escape(curves.name)
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f"<title>{name}</title><style>{_STYLE}</style></head><body>\n<h1>{name}</h1>\n"
    yield _table(_overview(summary, curves))
    if has_losses(curves.records):
        yield _section("Loss", as_svg(loss_figure(curves.records, curves.name)))
    for title, metrics in _PANELS:
        yield _panel(title, curves, metrics)
    events = [record for record in curves.records if record.get("method/event")]
    if events:
        yield _section("Events", _events(events))
    if with_spectra:
        figure = draw_spectra(spectra(run))
        yield _section("Spectra of what training added", as_svg(figure))
    yield _section("Machine and versions", _table(_nested(summary, ("hardware", "versions"))))
    yield _section("Run", f"<pre>{html.escape(_settings(run))}</pre>")
    yield "</body></html>\n"


def _overview(summary: Mapping[str, Any], curves: Curves) -> Iterator[tuple[str, str]]:
    last = {}
    for record in curves.records:
        last |= {key: value for key, value in record.items() if value is not None}
    yield "status", str(summary.get("status", "not finished"))
    if summary.get("reason"):
        yield "reason", str(summary["reason"])
    for key in ("step", "tokens", "train/loss", "eval/loss", "eval/perplexity"):
        if key in last:
            yield key, _number(last[key])
    yield "hours of training", _number(float(curves.scale("time")[-1]))
    yield "bytes on the wire per process", _number(float(curves.scale("bytes")[-1]))
    for key in ("started_at", "ended_at"):
        if key in summary:
            yield key.replace("_", " "), str(summary[key])


def _panel(title: str, curves: Curves, metrics: Sequence[str]) -> str:
    """Metrics side by side over the steps; nothing where the run reports none of them."""
    known = [metric for metric in metrics if len(curves.series(metric, "step")[1])]
    if not known:
        return ""
    figure = new_figure(4.5 * len(known), 3.0)
    axes = figure.subplots(1, len(known), squeeze=False)[0]
    for place, metric in zip(axes, known, strict=True):
        draw_curves(place, [curves], metric, "step")
    return _section(title, as_svg(figure))


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    keys = ("step", "method/event", "method/function_drift", "method/moments_reset_fraction")
    rows = [[_number(event.get(key, "")) for key in keys] for event in events[-_EVENTS_SHOWN:]]
    head = "".join(f"<th>{key.removeprefix('method/').replace('_', ' ')}</th>" for key in keys)
    said = f"<p>the last {len(rows)} of {len(events)}</p>" if len(rows) < len(events) else ""
    return f"{said}<table><tr>{head}</tr>{''.join(map(_row, rows))}</table>"


def _nested(summary: Mapping[str, Any], sections: Iterable[str]) -> Iterator[tuple[str, str]]:
    for section in sections:
        values = summary.get(section)
        for key, value in values.items() if isinstance(values, dict) else ():
            if value is not None:
                yield key.replace("_", " "), str(value)


def _section(title: str, content: str) -> str:
    return f'<h2>{html.escape(title)}</h2>\n<div class="scroll">{content}</div>\n'


def _table(rows: Iterable[Sequence[str]]) -> str:
    return f"<table>{''.join(map(_row, rows))}</table>\n"


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e-2 or abs(value) >= 1e5 else f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _settings(run: Path) -> str:
    """The resolved run, credentials masked."""
    try:
        data = read_yaml(run / "run.yaml").data
    except ReloraError as error:
        return str(error)
    return json.dumps(redact(data), indent=1, ensure_ascii=False)
