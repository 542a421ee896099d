"""The documents tell the truth about what can be checked cheaply: links, commands, files, pages."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from relora_ds.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
README_LIMIT = 200
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "configs/*.md")
    for path in ROOT.glob(pattern)
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# files of the project that a text names, in a command or in a sentence
_FILE = re.compile(
    r"(?<![\w./-])((?:benchmarks|configs|docs|launch|relora_ds|tests|tools)/[\w./-]*\w)"
)
_TEST = re.compile(r"(?<![\w/])(test_\w+\.py)")
_VERB = re.compile(r"relora-ds ([a-z][a-z-]*)")


def _anchors(page: Path) -> set[str]:
    """Names under which GitHub links to the headings of a page."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text()))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_the_readme_fits_its_limit() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LIMIT


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in _LINK.findall(_FENCE.sub("", (ROOT / page).read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in _FILE.findall(text):
        assert (ROOT / name).exists(), f"{page} names {name}"
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(_TEST.findall(text)) <= tests, page


@pytest.mark.parametrize("page", PAGES)
def test_verbs_that_are_named_exist(page: str) -> None:
    named = set(_VERB.findall("\n".join(_FENCE.findall((ROOT / page).read_text()))))
    assert named <= set(VERBS), page


def test_every_page_of_the_documentation_is_listed_in_the_readme() -> None:
    linked = set(_LINK.findall((ROOT / "README.md").read_text()))
    assert {page for page in PAGES if page != "README.md"} <= linked


def _tool(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / name))


def test_the_configuration_page_is_that_of_the_schema() -> None:
    tool = _tool("describe_config.py")
    message = "run tools/describe_config.py"
    assert tool["PAGE"].read_text() == tool["describe"]().rstrip() + "\n", message


def test_the_tree_is_the_one_that_is_there() -> None:
    tool = _tool("describe_tree.py")
    page = tool["PAGE"].read_text()
    assert tool["with_tree"](page) == page, "run tools/describe_tree.py"
