"""Make one table of the folders that runs left: python results/pack.py RUN [RUN ...] > TABLE.jsonl

A line for each run: its name, the flags of config.json, the rows of eval.json, and each column of
metrics.jsonl as a list; null for a file that is not there.
"""

import json
import sys
from pathlib import Path


def packed(folder: Path) -> dict:
    """All figures of a run."""
    files = {name: folder / name for name in ("config.json", "eval.json", "metrics.jsonl")}
    texts = {name: path.read_text() if path.exists() else "null" for name, path in files.items()}
    metrics = [json.loads(line) for line in texts["metrics.jsonl"].splitlines()]
    columns = {key: [row[key] for row in metrics] for key in metrics[0]} if metrics[0] else None
    config, rows = json.loads(texts["config.json"]), json.loads(texts["eval.json"])
    return {"run": folder.name, "config": config, "eval": rows, "metrics": columns}


if __name__ == "__main__":
    for name in sys.argv[1:] or sys.exit(__doc__):
        print(json.dumps(packed(Path(name)), separators=(",", ":")))
