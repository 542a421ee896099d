"""Curves of several runs, and the page about one."""

from __future__ import annotations

import html
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from relora_ds.cli.main import main
from relora_ds.errors import ConfigError
from relora_ds.train.telemetry.plot import plot_run
from relora_ds.train.views.curves import draw_curves, plot_runs, read_curves
from relora_ds.train.views.report import write_report


def write_run(directory: Path, steps: int = 40) -> Path:
    """A run that reported every tenth step: 100 tokens and 7 bytes each, 500 tokens per second."""
    directory.mkdir()
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "tokens": 100 * step,
            "train/loss": 5.0 / step,
            "train/lr": 1e-3,
            "throughput/tokens_per_second": 500.0,
            "memory/max_allocated_bytes": 10**9,
            "communication/wire_bytes_per_step": 7,
        }
        for step in range(10, steps + 1, 10)
    ]
    lines[1] |= {"method/event": "merge", "method/function_drift": 3e-8}
    lines[-1]["eval/loss"] = 1.5
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
    return directory


def test_every_axis_is_derived_from_what_was_reported(tmp_path: Path) -> None:
    curves = read_curves(write_run(tmp_path / "a"))
    assert curves.scale("step").tolist() == [10, 20, 30, 40]
    assert curves.scale("tokens").tolist() == [1000, 2000, 3000, 4000]
    assert curves.scale("time") * 3600 == pytest.approx([2, 4, 6, 8])
    assert curves.scale("bytes").tolist() == [70, 140, 210, 280]
    place, values = curves.series("eval/loss", "tokens")
    assert (place.tolist(), values.tolist()) == ([4000], [1.5])


@pytest.mark.parametrize("name", [r"a$\frac$b", "$x_1$", "one$", "_hidden", "<b>&amp;"])
def test_a_name_is_drawn_as_it_is_written(tmp_path: Path, name: str) -> None:
    run, other = write_run(tmp_path / name), write_run(tmp_path / "other")
    figure = Figure()
    axes = figure.subplots()
    assert draw_curves(axes, [read_curves(run), read_curves(other)], "train/loss", "step")
    legend = axes.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 2
    plot_runs([run, other], tmp_path / "plot.png", "train/loss", "step")
    plot_run(run / "metrics.jsonl", tmp_path / "loss.png")
    page = write_report(run, tmp_path / "page.html").read_text()
    assert f"<h1>{html.escape(name)}</h1>" in page


def test_unknown_figures_are_left_out_of_axes_and_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    records[0] |= {"throughput/tokens_per_second": None, "train/loss": None}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    curves = read_curves(run)
    assert curves.scale("time") * 3600 == pytest.approx([0, 2, 4, 6])
    assert len(curves.series("train/loss", "step")[1]) == 3


@pytest.mark.parametrize("over", ["step", "tokens", "time", "bytes"])
def test_runs_are_drawn_over_every_axis(
    tmp_path: Path, over: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_run(tmp_path / name)) for name in "ab"]
    output = tmp_path / "both.svg"
    assert main(["plot", *runs, "--over", over, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert output.read_text().count('id="line2d_') > 2


def test_one_run_is_drawn_where_it_always_was(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    assert main(["plot", str(run)]) == 0
    assert (run / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_one_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"no run reports train/los; they report .*train/loss"):
        plot_runs([run], tmp_path / "x.png", "train/los", "step")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no report"):
        read_curves(run)
    with pytest.raises(ConfigError, match="give the output_dir of a run"):
        read_curves(tmp_path)


class Page(HTMLParser):
    """What a page refers to, what it holds, and whether its elements are closed."""

    EMPTY = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.elements: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value or "")
            if value and "url(" in value:
                self.references.append(value.partition("url(")[2])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(run: Path) -> Page:
    output = run / "report.html"
    assert write_report(run, output) == output
    page = Page(output.read_text())
    assert page.open == []
    return page


def test_the_page_stands_alone_and_tells_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    summary = {"status": "completed", "hardware": {"device": "NVIDIA H100"}, "versions": {}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "run.yaml").write_text(
        "method: {name: relora}\nlog: {wandb: {api_key: hunter2hunter2}}\n"
    )
    page = report(run)
    assert all(reference.startswith("#") for reference in page.references), page.references
    assert not {"script", "link", "img", "iframe"} & set(page.elements)
    assert page.elements.count("svg") == 5  # loss, throughput, memory, wire, rates
    for said in ("completed", "NVIDIA H100", "relora", "merge", "1.5000", "4,000"):
        assert said in page.text
    assert "hunter2" not in page.text


def test_a_run_that_goes_on_has_a_page_and_names_stay_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>a&b", steps=20)
    page = report(run)
    assert "not finished" in page.text
    assert "<b>a&b" in page.text
    assert "b" not in page.elements
