"""A table that puts runs beside the paper's figures (paper.csv), and a picture of pass@k for each.

    python results/show.py RUN [RUN ...]    # folders that runs left; prints Markdown

Each folder gets a pass_at_k.png.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from softcot import COLORS

FILES = ("config.json", "eval.json")  # what a finished run has
OWN = ("seed", "out_dir", "resume", "threads", "device", "eval_tasks", "eval_settings")  # of each run


def plot_pass_at_k(out: Path, cot: str, task: str) -> None:
    """pass_at_k.png from eval.json: pass@k of the sampled settings, bars: error over problems."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = [row for row in json.loads((out / "eval.json").read_bytes()) if row["task"] == task]
    latest = {(row["setting"], row["stage"]): row for row in rows if row.get("n", 1) > 1}
    names = [name for name, stage in latest if stage == "trained"]
    if not names:
        return
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names):
        for stage, style, c in (("base", "--", COLORS["base"]), ("trained", "-", COLORS[cot])):
            if (name, stage) in latest:
                row = latest[name, stage]
                ks = [int(k) for k in row["k"]]
                y, error = ([*row[key].values()] for key in ("k", "k_error"))
                axes.errorbar(ks, y, error, fmt=style, color=c, marker="o", markersize=4, capsize=2)
                text, at, side, shift = f"{cot}-trained", len(ks) // 2, "right", (-6, 5)  # above it
                if stage == "base":
                    text, side, shift = "base", "left", (6, -12)
                where = ((ks[at], y[at]), shift)
                axes.annotate(text, *where, textcoords="offset points", color=c, ha=side)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set(title=name, xlabel="k", ylim=(0, 1.15), yticks=np.linspace(0, 1, 6))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"pass@k on {task} test problems")
    figure.savefig(out / "pass_at_k.png", dpi=110)


def report(folders: list[str]) -> str:
    """A Markdown table of runs, in %, NLL in nats a token: mean ± deviation (runs) [the paper's].

    Runs of one mode that differ in more than their seed have rows of their own. A base that several
    runs evaluated with one seed counts once. OSError: no files of a run.
    """
    columns = ["base", "hard", "fuzzy", "soft"]
    with open(Path(__file__).parent / "paper.csv", encoding="utf-8") as file:
        paper = {tuple(row[:5]): dict(zip(columns, row[5:])) for row in csv.reader(file)}
    cells = {}  # (model, trained on, tested on, setting, metric, flags) -> column -> run -> value
    files = {Path(f): [(Path(f) / name).read_bytes() for name in FILES] for f in folders}
    runs = {folder: [json.loads(text) for text in texts] for folder, texts in files.items()}
    for folder, (config, rows) in runs.items():
        alike = [c for c, _ in runs.values() if all(c[k] == config[k] for k in ("model", "task", "cot"))]
        differ = [k for k in config if k not in OWN and len({str(c.get(k)) for c in alike}) > 1]
        flags = " ".join(f"--{k.replace('_', '-')} {config[k]}" for k in differ)
        for row in rows:
            passed = row.get("k", {})
            scores = {f"pass@{k}": 100 * passed[k] for k in passed if int(k) in (1, row["n"])}
            scores |= {"accuracy": 100 * row["accuracy"], "NLL": row["nll"]} if not passed else {}
            column = "base" if row["stage"] == "base" else config["cot"]
            run = (config["model"] or "toy", config["task"], row["task"], row["setting"])
            which, own = (config["seed"], "") if column == "base" else (folder, flags)
            for metric, value in scores.items():
                cells.setdefault((*run, metric, own), {}).setdefault(column, {})[which] = value
    names = ["model", "trained on", "tested on", "setting", "metric", "flags", *columns]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for run, found in cells.items():
        texts, same = [], [p for p in paper if p[0] in run[0].lower() and p[1:] == run[1:5]]
        for column in columns:
            values = list(found.get(column, {}).values())
            spread = f" ± {np.std(values, ddof=1):.2f} ({len(values)})" if len(values) > 1 else ""
            texts.append(f"{np.mean(values):.2f}{spread}" if values else "-")
            texts[-1] += f" [paper {paper[same[0]][column]}]" if same else ""
        lines.append(f"| {' | '.join((Path(run[0]).name, *run[1:], *texts))} |")
    return "\n".join(lines) + "\n"


def main(folders: list[str]) -> int:
    """Print the table; one line and status 2 if a folder holds no run."""
    try:
        table = report(folders)
        for folder in map(Path, folders):
            config = json.loads((folder / "config.json").read_bytes())
            plot_pass_at_k(folder, config["cot"], (config["eval_tasks"] or [config["task"]])[0])
    except OSError as error:
        print(f"show.py: error: {error}: give folders with config.json, eval.json", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(table.encode())  # whatever the terminal's encoding: it has a ± in it
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else __doc__)
