"""Is softcot.py plainly written (and toy_tasks.py within its columns)? Columns, functions.

python .ci/style.py exits with 1 and says where not. Lengths are of code, without docstring and
blank lines.
"""

import ast
import statistics
import sys
from pathlib import Path

FILE = Path(__file__).parent.parent / "softcot.py"
COLUMNS, LONGEST, MEDIAN = 100, 60, 15


def code_lines(node: ast.FunctionDef, lines: list[str]) -> int:
    """How many lines of a function are code."""
    first = node.body[0]
    docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    kept = set(range(node.lineno, node.end_lineno + 1))
    if docstring:
        kept -= set(range(first.lineno, first.end_lineno + 1))
    return sum(bool(lines[i - 1].strip()) for i in kept)


def main() -> int:
    """Print what is wrong; the exit status."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    wrong = [f"line {i} has {len(x)} columns" for i, x in enumerate(lines, 1) if len(x) > COLUMNS]
    toy = FILE.with_name("toy_tasks.py").read_text(encoding="utf-8").splitlines()
    wrong += [f"toy_tasks.py, line {i}: {len(x)}" for i, x in enumerate(toy, 1) if len(x) > COLUMNS]
    tree = ast.walk(ast.parse("\n".join(lines)))
    functions = {n.name: code_lines(n, lines) for n in tree if isinstance(n, ast.FunctionDef)}
    wrong += [f"{name}() has {n} lines" for name, n in functions.items() if n > LONGEST]
    middle = statistics.median(functions.values())
    if middle > MEDIAN:
        wrong.append(f"the median function has {middle} lines")
    print(f"softcot.py: {len(lines)} lines, {len(functions)} functions, median {middle}")
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
