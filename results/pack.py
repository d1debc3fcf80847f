"""Make one table of the folders that runs left: python results/pack.py RUN [RUN ...] > TABLE.jsonl

A line for each run: its name, the flags of config.json, the rows of eval.json, and the columns of
metrics.jsonl as lists without seconds and memory, which tell of the machine; null for a file that
is not there. Numbers with a point have four digits.
"""

import functools
import json
import sys
from pathlib import Path


def short(number: str) -> float:
    """A number with a point, to four digits."""
    return float(f"{float(number):.4g}")


def packed(folder: Path) -> dict:
    """All figures of a run."""
    files = {name: folder / name for name in ("config.json", "eval.json", "metrics.jsonl")}
    texts = {name: path.read_text() if path.exists() else "null" for name, path in files.items()}
    read = functools.partial(json.loads, parse_float=short)
    metrics = [read(line) for line in texts["metrics.jsonl"].splitlines()]
    columns = None
    if metrics[0]:
        keys = dict.fromkeys(key for row in metrics for key in row)  # some lack: nothing was trained
        kept = [key for key in keys if not key.endswith(("_s", "_gib"))]
        columns = {key: [row.get(key) for row in metrics] for key in kept}
    config, rows = read(texts["config.json"]), read(texts["eval.json"])
    return {"run": folder.name, "config": config, "eval": rows, "metrics": columns}


if __name__ == "__main__":
    for name in sys.argv[1:] or sys.exit(__doc__):
        print(json.dumps(packed(Path(name)), separators=(",", ":")))
