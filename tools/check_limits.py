"""Fail when a file or a function is too long to be read in one go, or a folder too full.

Limits: 400 lines per file, 60 per function from its `def` to its last line, docstring included, and
12 source files (.py, .c) in each folder of the package, `__init__.py` included.

Example:
    python tools/check_limits.py
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FILE_LIMIT = 400
FUNCTION_LIMIT = 60
FOLDER_LIMIT = 12
PACKAGE = "relora_ds"
DIRECTORIES = (PACKAGE, "tools", "launch", "benchmarks", "tests")
SOURCES = (".py", ".c")


def find_offenders(root: Path) -> list[str]:
    """One line per offence in the project at `root`: ``path:line: what is too long`` of files, then
    ``path: what is too full`` of folders."""
    files = [
        f"{path.relative_to(root)}:{line}: {offence}"
        for name in DIRECTORIES
        for path in sorted((root / name).rglob("*.py"))
        for line, offence in sorted(_check(path))
    ]
    sources = (path for path in (root / PACKAGE).rglob("*") if path.suffix in SOURCES)
    counts = Counter(path.parent.relative_to(root) for path in sources)
    return files + [
        f"{folder}: folder has {count} source files, the limit is {FOLDER_LIMIT}"
        for folder, count in sorted(counts.items())
        if count > FOLDER_LIMIT
    ]


def _check(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each offence in a file."""
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    if lines > FILE_LIMIT:
        yield 1, f"file has {lines} lines, the limit is {FILE_LIMIT}"
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        yield error.lineno or 1, f"not valid Python: {error.msg}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LIMIT:
                yield (
                    node.lineno,
                    f"function {node.name} has {length} lines, the limit is {FUNCTION_LIMIT}",
                )


def main() -> int:
    """Check the project given on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "root",
        type=Path,
        nargs="?",
        default=Path(__file__).resolve().parents[1],
        help="root of the project [the one this file belongs to]",
    )
    offenders = find_offenders(parser.parse_args().root)
    for offender in offenders:
        print(offender, file=sys.stderr)
    return 1 if offenders else 0


if __name__ == "__main__":
    sys.exit(main())
