"""Prints the budgets of docs/architecture.md; fails when a hard one is broken."""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

HARD_FUNCTION, HARD_FILE, HARD_PARAMETERS = 60, 400, 6
AIM_MEDIAN, AIM_P95 = 8, 35
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    """All functions of a file."""
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def parameters(function: Function) -> int:
    """Parameters of a function, self and cls left out."""
    names = [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def main() -> int:
    """Print the figures; the exit code is 1 when something is over a hard budget."""
    over, lengths, files = [], [], sorted(Path("controlfill").rglob("*.py"))
    for file in files:
        text = file.read_text("utf-8")
        lines = len(text.splitlines())
        if lines > HARD_FILE:
            over.append(f"{file}: {lines} lines, at most {HARD_FILE}")
        for function in functions(ast.parse(text)):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            lengths.append(length)
            where = f"{file}:{function.lineno} {function.name}"
            if length > HARD_FUNCTION:
                over.append(f"{where}: {length} lines, at most {HARD_FUNCTION}")
            if parameters(function) > HARD_PARAMETERS:
                over.append(
                    f"{where}: {parameters(function)} parameters, at most {HARD_PARAMETERS}"
                )
    lengths.sort()
    p95 = lengths[int(0.95 * len(lengths))]
    print(f"{len(files)} files, {sum(len(f.read_text().splitlines()) for f in files)} lines")
    print(
        f"functions: median {statistics.median(lengths):.0f} lines (aim {AIM_MEDIAN}), "
        f"95 % within {p95} (aim {AIM_P95}), longest {lengths[-1]} (hard {HARD_FUNCTION})"
    )
    print("\n".join(over) or "every hard budget is kept")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
