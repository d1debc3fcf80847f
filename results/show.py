"""A table that puts runs beside the paper's (paper.csv), a picture of pass@k for each, and CoTs.

    python results/show.py RUN [RUN ...]            # folders that runs left; prints Markdown
    python results/show.py RUN --steps 1 50 100     # one run: behind the table, CoTs of these steps

Each folder gets a pass_at_k.png.
"""

import argparse
import csv
import itertools
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from softcot import COLORS, SETTINGS

FILES = ("config.json", "eval.json")  # what a finished run has
OWN = ("seed", "out_dir", "resume", "threads", "device", "eval_tasks", "eval_settings")  # of each run
EVALUATED = ("eval_k", "eval_limit", "eval_max_cot", "max_answer")  # what figures of a base depend on, too
WIDTH = 38  # of a column of CoTs, in characters
LEGEND = """\
A soft CoT is shown by the likeliest token of each position. Where that has less than 0.9 of the
mixture, also by the second one: [7|3 .55/.40] is 0.55 of 7 and 0.40 of 3."""


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
        differ = {k for k in config if k not in OWN and len({str(c.get(k)) for c in alike}) > 1}
        others = [c for c, _ in runs.values() if all(c[k] == config[k] for k in ("model", "task"))]
        asked = {k for k in EVALUATED if len({str(c.get(k)) for c in others}) > 1}
        for row in rows:
            passed = row.get("k", {})
            scores = {f"pass@{k}": 100 * passed[k] for k in passed if int(k) in (1, row["n"])}
            scores |= {"accuracy": 100 * row["accuracy"], "NLL": row["nll"]} if not passed else {}
            column = "base" if row["stage"] == "base" else config["cot"]
            run = (config["model"] or "toy", config["task"], row["task"], row["setting"])
            keys = asked | unusual(config, row["setting"])
            which, keys = (config["seed"], keys) if column == "base" else (folder, keys | differ)
            own = " ".join(f"--{k.replace('_', '-')} {config[k]}" for k in config if k in keys)
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


def unusual(config: dict, setting: str) -> set[str]:
    """Which of tau and noise a run changed for this setting: those of its own mode."""
    if not setting.startswith(config["cot"]):
        return set()
    usual = SETTINGS[f"{config['cot']}_sample"]
    pairs = {"tau": usual.tau, "sigma_scale": usual.noise or None}
    return {k for k, value in pairs.items() if config.get(k, value) != value}


def position(token) -> str:
    """One position of a soft CoT as text: see LEGEND, and shadow() in softcot.py."""
    if isinstance(token, str):
        return token
    first, p, second, q = token
    inner = "|".join(text.strip() or repr(text) for text in (first, second))
    shares = "/".join(f"{share:.2f}".removeprefix("0") for share in (p, q))
    before, after = (" " * side.isspace() for side in (first[:1], first[-1:]))
    return f"{before}[{inner} {shares}]{after}"


def cells(rows: list[dict]) -> list[str]:
    """What is said of a step, from its lines of samples.jsonl: question and gold, then each CoT."""
    prompt = rows[0]["prompt"].strip()
    question = prompt if len(prompt) < 200 else "..." + prompt[-197:]  # the end asks the question
    found = [f"step {rows[0]['step']}\n{question}\ngold: {rows[0]['gold']}"]
    for row in rows:
        cot = "".join(map(position, row.get("shadow", [row["cot"]])))  # hard, or an older run
        end = "" if row["stopped"] else " (did not stop)"
        answer = f"\\boxed{{{row['answer']}   reward {row['reward']:g}"
        found.append(f"{cot.rstrip()}{end}\n{answer}")
    return found


def samples(folder: Path, steps: list[int]) -> str:
    """CoTs of a run's steps side by side; of its first, middle and last recorded step, if none.

    Of steps that were not recorded the nearest ones that were. Nothing, if the run has no CoTs."""
    if not (folder / "samples.jsonl").exists():
        return ""
    lines = (folder / "samples.jsonl").read_bytes().split(b"\n")[:-1]  # behind it: half a line
    rows, recorded = [json.loads(line) for line in lines], {}
    for row in rows:
        recorded.setdefault(row["step"], {}).setdefault(row["prompt"], []).append(row)
    known = list(recorded)
    if not known:
        return ""
    steps = steps or [known[0], known[len(known) // 2], known[-1]]
    nearest = [min(known, key=lambda there: abs(there - step)) for step in steps]
    columns = [cells(next(iter(recorded[step].values()))) for step in dict.fromkeys(nearest)]
    text = f"\n{LEGEND}\n" if any("shadow" in row for row in rows) else ""
    for row in itertools.zip_longest(*columns, fillvalue=""):
        wrap = lambda cell: [x for line in cell.splitlines() for x in textwrap.wrap(line, WIDTH)]
        for parts in itertools.zip_longest(*map(wrap, row), fillvalue=""):
            text += "\n" + "   ".join(part.ljust(WIDTH) for part in parts).rstrip()
        text += "\n"
    return text


def main(arguments=None) -> int:
    """Print the table, of one run also CoTs; one line and status 2 if a folder holds no run."""
    how = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a folder that a run left")
    parser.add_argument("--steps", type=int, nargs="+", default=[], help="whose CoTs to print")
    given = parser.parse_args(arguments)
    try:
        text = report(given.runs)
        for folder in map(Path, given.runs):
            config = json.loads((folder / "config.json").read_bytes())
            plot_pass_at_k(folder, config["cot"], (config["eval_tasks"] or [config["task"]])[0])
    except OSError as error:
        print(f"show.py: error: {error}: give folders with config.json, eval.json", file=sys.stderr)
        return 2
    text += samples(Path(given.runs[0]), given.steps) if len(given.runs) == 1 else ""
    sys.stdout.buffer.write(text.encode())  # whatever the terminal's encoding: it has a ± in it
    return 0


if __name__ == "__main__":
    sys.exit(main())
