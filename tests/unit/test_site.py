"""The site of the documentation: every page is in it, and every link leads somewhere."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "tools" / "site"
HOOKS = runpy.run_path(str(SITE / "pages.py"))
PAGES: dict[str, str] = HOOKS["pages"]()
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


class _Settings(yaml.SafeLoader):
    """Knows the one value of mkdocs.yml that is made by Python."""


_Settings.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def _listed(nav: Any) -> Iterator[str]:
    """Pages of a navigation, in order."""
    if isinstance(nav, str):
        yield nav
    for each in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _listed(each)


def _on_site(source: str) -> str:
    return HOOKS["relinked"]((ROOT / source).read_text(), source)


def _anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_every_page_is_listed_once() -> None:
    settings = yaml.load((SITE / "mkdocs.yml").read_text(), _Settings)
    listed = list(_listed(settings["nav"]))
    assert sorted(listed) == sorted(PAGES.values())
    assert (SITE / settings["docs_dir"]).resolve() == ROOT / "docs"


@pytest.mark.parametrize("source", PAGES)
def test_links_lead_to_pages_and_headings_of_the_site(source: str) -> None:
    paths = {page: path for path, page in PAGES.items()}
    for link in _LINK.findall(_FENCE.sub("", _on_site(source))):
        page, _, anchor = link.partition("#")
        if page.startswith("https:"):
            continue
        assert page in paths or not page, f"{source}: {link}"
        if anchor:
            there = _on_site(paths[page] if page else source)
            assert anchor in _anchors(there), f"{source}: {link}"


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("see [a](docs/data.md#parts)", "see [a](data.md#parts)"),
        ("see [`b`](configs/README.md) and [c](LICENSE)", "see [`b`](configs.md) and c"),
        ("[d](https://a.b/c) [e](#here)", "[d](https://a.b/c) [e](#here)"),
        ("`[f](docs/data.md)`", "`[f](docs/data.md)`"),
        ("```\n[g](LICENSE)\n```\n", "```\n[g](LICENSE)\n```\n"),
    ],
)
def test_links_are_moved(text: str, moved: str) -> None:
    assert HOOKS["relinked"](text, "README.md") == moved


class _Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id":
                self.anchors.add(value or "")
            elif tag == "a" and key == "href":
                self.links.add(value or "")


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("no mkdocs-material: pip install 'relora_ds[site]'")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict")
    done = subprocess.run(
        [*command, "-f", str(SITE / "mkdocs.yml"), "-d", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    built = {path.name: _Page(path) for path in tmp_path.glob("*.html") if path.name != "404.html"}
    assert len(built) == len(PAGES)
    for name, page in built.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if ":" in target:
                continue
            assert target in built or target in ("", "."), f"{name}: {link}"
            there = built[target if target in built else name]
            assert not anchor or anchor in there.anchors, f"{name}: {link}"
