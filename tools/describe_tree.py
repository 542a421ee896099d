"""Print the source tree with one line per file, as the README shows it.

python tools/describe_tree.py
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = ("launch", "relora_ds", "tools")
_WIDTH = 44


def describe(root: Path = ROOT) -> str:
    """One line per folder and file: its path and what it is for."""
    lines = [f"{path:<{_WIDTH}}{text}" for path, text in _entries(root)]
    return "\n".join(line.rstrip() for line in lines)


def _entries(root: Path) -> Iterator[tuple[str, str]]:
    for folder in _FOLDERS:
        yield f"{folder}/", ""
        for path in sorted((root / folder).rglob("*")):
            depth = len(path.relative_to(root).parts) - 1
            if path.is_dir() and path.name != "__pycache__":
                yield "  " * depth + f"{path.name}/", _first_line(path / "__init__.py")
            elif path.suffix == ".py" and path.name != "__init__.py":
                yield "  " * depth + path.name, _first_line(path)
            elif path.suffix in (".c", ".sh", ".sbatch", ".yaml"):
                yield "  " * depth + path.name, _first_comment(path)


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) if path.is_file() else None
    return (text or "").split("\n")[0]


def _first_comment(path: Path) -> str:
    mark = "// " if path.suffix == ".c" else "# "
    lines = [line for line in path.read_text().splitlines() if line.startswith(mark)]
    return lines[0].removeprefix(mark) if lines else ""


if __name__ == "__main__":
    sys.stdout.write(describe() + "\n")
