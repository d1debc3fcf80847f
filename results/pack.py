"""Make one table of the folders that runs left: python results/pack.py RUN [RUN ...] > TABLE.jsonl

A line for each run: its name, the flags of config.json, the rows of eval.json, and the columns of
metrics.jsonl as lists, to five digits, without seconds and memory, which tell of the machine; null
for a file that is not there.
"""

import json
import sys
from pathlib import Path


def column(values: list) -> list:
    """Numbers to five digits; what has no point as it is."""
    return [float(f"{x:.5g}") if isinstance(x, float) else x for x in values]


def packed(folder: Path) -> dict:
    """All figures of a run."""
    files = {name: folder / name for name in ("config.json", "eval.json", "metrics.jsonl")}
    texts = {name: path.read_text() if path.exists() else "null" for name, path in files.items()}
    metrics = [json.loads(line) for line in texts["metrics.jsonl"].splitlines()]
    columns = None
    if metrics[0]:
        kept = [key for key in metrics[0] if not key.endswith(("_s", "_gib"))]
        columns = {key: column([row[key] for row in metrics]) for key in kept}
    config, rows = json.loads(texts["config.json"]), json.loads(texts["eval.json"])
    return {"run": folder.name, "config": config, "eval": rows, "metrics": columns}


if __name__ == "__main__":
    for name in sys.argv[1:] or sys.exit(__doc__):
        print(json.dumps(packed(Path(name)), separators=(",", ":")))
