"""Write the tree of the package into docs/architecture.md: folders, with what each one is for.

Example:
    python tools/describe_tree.py
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
_BEGIN, _END = "<!-- tree: python tools/describe_tree.py -->\n", "<!-- end of tree -->\n"
_WIDTH = 22


def with_tree(page: str) -> str:
    """The page with the tree as it is now between its two marks, which must be there."""
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END)
    tree = "\n".join(_lines(ROOT / "relora_ds"))
    return f"{before}{_BEGIN}```\n{tree}\n```\n{_END}{after}"


def _lines(package: Path) -> Iterator[str]:
    """One line per folder: its name, indented by its depth, and its docstring's first line."""
    for opening in sorted(package.rglob("__init__.py"), key=lambda path: path.parent.parts):
        depth = len(opening.parent.relative_to(package).parts)
        text = ast.get_docstring(ast.parse(opening.read_text())) or ""
        name = "  " * depth + opening.parent.name + "/"
        yield f"{name:<{_WIDTH}}{text.splitlines()[0]}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(with_tree(PAGE.read_text()))


if __name__ == "__main__":
    sys.exit(main())
