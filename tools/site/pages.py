"""Pages of the site that lie outside docs/, and links as they are on the site; hooks of mkdocs."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "configs.md",
}
"""Page of the site by its path in the project, of those that docs/ does not hold."""
_LINK_OR_CODE = re.compile(
    r"^```.*?^```$|\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([^)\s]+)\)|`[^`\n]*`", re.MULTILINE | re.DOTALL
)
"""Blocks and words of code too, in which nothing is a link."""


def pages() -> dict[str, str]:
    """Every page of the site by its path in the project."""
    own = {f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    return own | ELSEWHERE


def relinked(text: str, source: str) -> str:
    """A page with its links as the site has them.

    Of a link to a file of the project that is no page of the site, the text stays.

    Args:
        text: Markdown.
        source: path of the page in the project.
    """
    known = pages()

    def moved(link: re.Match[str]) -> str:
        shown, target = link.groups()
        path, mark, anchor = (target or "").partition("#")
        if ":" in path or not path:
            return link[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        return f"[{shown}]({known[place]}{mark}{anchor})" if place in known else shown

    return _LINK_OR_CODE.sub(moved, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that docs/ does not hold."""
    from mkdocs.structure.files import File

    for source, page in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Give a page the links of the site."""
    source = {name: path for path, name in pages().items()}[page.file.src_uri]
    return relinked(markdown, source)
