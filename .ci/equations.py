"""Write the table "equation, function" with links of README.md from the docstrings of softcot.py.

python .ci/equations.py writes it; --check exits with 1 if README.md has another one.
"""

import ast
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent
START, END = "<!-- equations: written by .ci/equations.py -->", "<!-- end of equations -->"


def table() -> str:
    """One row for each function whose docstring names equations, in order of the first of these."""
    rows = []
    for node in ast.walk(ast.parse((HERE / "softcot.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            numbers = re.findall(r"\(eqs? ([0-9, -]+)\)", text)
            if numbers:
                what = re.split(r" *\(eqs? |(?<!eq)[.:] ", text)[0]
                named = ", ".join(dict.fromkeys(numbers))
                first = int(named.split(",")[0].split("-")[0])
                rows.append((first, named, node.name, node.lineno, what))
    lines = [f"| {eq} | [`{name}()`](softcot.py#L{line}) | {what} |"
             for _, eq, name, line, what in sorted(rows)]  # fmt: skip
    return "\n".join(["| equation | function | what |", "|---|---|---|", *lines])


def main() -> int:
    """Put the table in its place, or say whether it is there."""
    path = HERE / "README.md"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    new = f"{before}{START}\n{table()}\n{END}{after}"
    if "--check" in sys.argv:
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
