"""The page about a run as a browser shows it: nothing on its console, every plot drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from relora_ds.train.views.report import write_report
from tests.golden.make_checkpoint import checkpoint
from tests.harness.browser import NoEngineError, Opened, open_page

pytestmark = pytest.mark.slow

# of every plot: its size on the screen, paths that have a length, references to what is not there
LOOK = """JSON.stringify({
    title: document.title,
    headings: [...document.querySelectorAll("h2")].map(each => each.textContent),
    width: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    loaded: performance.getEntriesByType("resource").map(each => each.name),
    plots: [...document.querySelectorAll("svg")].map(plot => ({
        box: [plot.getBoundingClientRect().width, plot.getBoundingClientRect().height],
        paths: [...plot.querySelectorAll("path")].filter(each => each.getTotalLength() > 0).length,
        curves: [...plot.querySelectorAll("g[id^=line2d] > path")]
            .filter(each => each.getBoundingClientRect().width > 20).length,
        shown: plot.querySelectorAll("use").length,
        lost: [...plot.querySelectorAll("use")].map(each => each.getAttribute("xlink:href"))
            .concat([...plot.querySelectorAll("[clip-path]")].map(
                each => each.getAttribute("clip-path").slice(4, -1)))
            .filter(name => !plot.querySelector(name)),
    })),
    twice: [...document.querySelectorAll("svg defs [id], svg clipPath[id]")]
        .filter((each, place, all) => all.slice(0, place).some(
            other => other.id === each.id && other.outerHTML !== each.outerHTML))
        .map(each => each.id),
})"""


def opened(page: Path, script: str = LOOK) -> Opened:
    """The page in an engine, or a test that is skipped."""
    try:
        return open_page(page, script)
    except NoEngineError as error:
        pytest.skip(f"no Chromium engine: {error}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with four reports, an event, and a checkpoint."""
    directory = tmp_path / "mine"
    shutil.copytree(checkpoint("relora", 2), directory / "checkpoints" / "step_5")
    (directory / "checkpoints" / "latest").write_text("step_5")
    records: list[dict[str, Any]] = [
        {
            "step": step,
            "tokens": 100 * step,
            "train/loss": 5.0 / step,
            "train/lr": 1e-3 / step,
            "train/grad_norm": 1.0 + step,
            "throughput/tokens_per_second": 500.0 + step,
            "memory/max_allocated_bytes": 10**9 + step,
            "communication/wire_bytes_per_step": 7 * step,
        }
        for step in range(10, 50, 10)
    ]
    records[1] |= {"method/event": "merge", "method/function_drift": 3e-8}
    text = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(text)
    (directory / "run.yaml").write_text("method: {name: relora}\nnote: <b>a & b</b>\n")
    return directory


def test_the_report_is_shown_whole_and_says_nothing(run: Path) -> None:
    page = opened(write_report(run, run / "report.html", with_spectra=True))
    assert page.console == [], page.engine
    found = page.found
    assert found["title"] == "mine"
    assert found["loaded"] == [], "the page needs nothing beside itself"
    assert found["width"] <= 0, "nothing is wider than the window"
    assert found["twice"] == [], "a name within the plots means one thing on the page"
    assert len(found["plots"]) == 6  # loss, throughput, memory, wire, rates, spectra
    for plot in found["plots"]:
        assert min(plot["box"]) > 100
        assert plot["paths"] > 10
        assert plot["curves"] >= 1
        assert plot["shown"] > 5
        assert plot["lost"] == []


def test_a_fault_of_a_page_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "faulty.html"
    page.write_text(
        '<html><head><link rel="icon" href="data:,"></head><body><script>console.warn("careful")'
        '</script><script>nowhere.at.all</script><img src="missing.png"></body></html>'
    )
    said = " ".join(opened(page, "JSON.stringify(1 + 1)").console)
    assert "careful" in said
    assert "nowhere is not defined" in said
