"""The paper's claims on the toy, one verdict each: python results/claims.py results/toy/*

Prints Markdown, and draws results/toy.png. Every difference is that of means over seeds, with a 95 % bootstrap interval over the
test problems (and seeds, drawn anew together: 2,000 draws). A claim of equality holds if the interval
lies above -5 points, a claim of superiority if it lies above 0, and neither is shown otherwise.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

from softcot import COLORS

COTS = ("hard", "fuzzy", "soft")
SETTINGS = [f"{cot}_{how}" for cot in COTS for how in ("greedy", "sample")]


def load(folders: list[str]) -> dict:
    """(run without its seed, stage, task, setting) -> {seed: record of eval.json}."""
    found = {}
    for folder in map(Path, folders):
        name, seed = folder.name.rsplit("-s", 1)
        for row in json.loads((folder / "eval.json").read_text()):
            if row["stage"] == "base" and name != "soft":
                continue  # every run evaluated the same base: take it from one
            run = "base" if row["stage"] == "base" else name
            key = (run, row["task"], row["setting"])
            found.setdefault(key, {})[int(seed)] = row
    return found


def pass_at_k(record: dict, k: int) -> np.ndarray:
    """pass@k of each problem [problems], from the number of right samples."""
    n, k = record["n"], min(k, record["n"])
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in record["correct"]])


class Grid:
    """The records, and the statistics that the claims need."""

    def __init__(self, folders: list[str]):
        self.found, self.rng = load(folders), np.random.default_rng(0)

    def values(self, run: str, task: str, setting: str, k: int = 1) -> np.ndarray:
        """pass@k in % [seeds, problems]."""
        records = self.found[run, task, setting]
        return 100 * np.stack([pass_at_k(records[seed], k) for seed in sorted(records)])

    def cell(self, *where) -> str:
        """Mean and standard deviation over seeds, of pass@k."""
        means = self.values(*where).mean(1)
        return f"{means.mean():.1f} ± {means.std(ddof=1):.1f}"

    def gap(self, a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
        """Mean of a - b, both [seeds, problems], and its bootstrap interval."""
        draws = []
        for _ in range(2000):
            problems = self.rng.integers(a.shape[1], size=a.shape[1])
            seeds = [self.rng.integers(len(x), size=len(x)) for x in (a, b)]
            draws.append(a[seeds[0]][:, problems].mean() - b[seeds[1]][:, problems].mean())
        return a.mean() - b.mean(), *np.percentile(draws, [2.5, 97.5])


def shown(gap: tuple[float, float, float]) -> str:
    """A difference in points with its interval."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gap)


def scalar(grid: Grid, run: str, task: str, setting: str, key: str) -> np.ndarray:
    """A number of eval.json [seeds]."""
    records = grid.found[run, task, setting]
    return np.array([records[seed][key] for seed in sorted(records)])


def draw(folders: list[str], path: Path) -> None:
    """Success rate and CoT length over the steps of training: mean of the seeds, and their range."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = {"success": "success rate, sampled CoT", "cot_len": "CoT length (tokens)"}
    for axes, (key, label) in zip(figure.subplots(1, 2), panels.items()):
        for cot, style, shift in zip(COTS, ("--", ":", "-"), (-12, 0, 6)):  # shift: of labels, points
            runs = [Path(f) for f in folders if Path(f).name.rsplit("-s", 1)[0] == cot]
            lines = [(run / "metrics.jsonl").read_text().splitlines() for run in runs]
            values = np.array([[json.loads(line)[key] for line in run] for run in lines])
            smooth = np.array([np.convolve(v, np.ones(5) / 5, mode="valid") for v in values])
            steps = np.arange(5, values.shape[1] + 1)
            axes.plot(steps, smooth.mean(0), style, color=COLORS[cot])
            axes.fill_between(steps, smooth.min(0), smooth.max(0), color=COLORS[cot], alpha=0.2, lw=0)
            end = (steps[-1], smooth.mean(0)[-1])
            axes.annotate(cot, end, (5, shift), textcoords="offset points", color=COLORS[cot])
        axes.set(xlabel="training step", ylabel=label, xlim=(0, 1.13 * steps[-1]))
        axes.margins(y=0.12)
        axes.grid(alpha=0.3)
    figure.suptitle(f"The toy, {len(runs)} seeds: mean of five steps, band from lowest to highest seed")
    figure.savefig(path, dpi=110)


def main(folders: list[str]) -> None:
    """Print the tables and the verdicts, draw the figure."""
    draw(folders, Path(__file__).parent / "toy.png")
    grid = Grid(folders)
    runs = ["base", *COTS]
    for task in ("toy", "toy-large"):
        print(f"### {task}: pass@1 / pass@32 in %, mean ± standard deviation over seeds\n")
        print("| trained with |", " | ".join(SETTINGS), "| CoT length, hard greedy |")
        print("|---" * (len(SETTINGS) + 2) + "|")
        for run in runs:
            cells = []
            for setting in SETTINGS:
                many = "" if setting.endswith("greedy") else " / " + grid.cell(run, task, setting, 32)
                cells.append(grid.cell(run, task, setting) + many)
            length = scalar(grid, run, task, "hard_greedy", "cot_len").mean()
            print(f"| {run} |", " | ".join(cells), f"| {length:.1f} |")
        print()
    print("### The claims\n")
    for task in ("toy", "toy-large"):
        for cot in ("soft", "fuzzy"):
            a, b = (grid.values(x, task, "hard_greedy") for x in (cot, "hard"))
            g = grid.gap(a, b)
            verdict = "holds" if g[1] > -5 else "fails" if g[2] < 0 else "not shown"
            print(f"1. {task}: {cot} training matches hard at greedy pass@1: {shown(g)}: {verdict}")
        for cot in ("soft", "fuzzy"):
            a, b = (grid.values(x, task, "hard_sample", 32) for x in (cot, "hard"))
            g = grid.gap(a, b)
            verdict = "holds" if g[1] > 0 else "fails" if g[2] < 0 else "not shown"
            print(f"2. {task}: {cot} training beats hard at pass@32: {shown(g)}: {verdict}")
        for run in COTS:
            best = grid.values(run, task, "hard_greedy")
            gaps = {s: grid.gap(best, grid.values(run, task, s)) for s in ("soft_greedy", "fuzzy_greedy")}
            ok = all(g[1] > -5 for g in gaps.values())
            verdict = "holds" if ok else "fails" if any(g[2] < 0 for g in gaps.values()) else "not shown"
            words = ", ".join(f"over {s} {shown(g)}" for s, g in gaps.items())
            print(f"3. {task}: {run}-trained, hard greedy is best: {words}: {verdict}")
        g = grid.gap(grid.values("hard", task, "soft_greedy"), grid.values("hard", task, "hard_greedy"))
        verdict = "holds" if g[2] <= 5 else "fails" if g[1] > 0 else "not shown"
        print(f"4. {task}: soft inference gives hard-trained models no gain: {shown(g)}: {verdict}")
    for key, claim in (("nll", "5. toy-walk: NLL in nats per token"),):
        cells = []
        for run in runs:
            x = scalar(grid, run, "toy-walk", "teacher_forced", key)
            cells.append(f"{run} {x.mean():.3f} ± {x.std(ddof=1):.3f}")
        print(f"{claim}: {', '.join(cells)} (the least possible: {math.log(2):.3f})")
    cells = []
    for run in runs:
        x = scalar(grid, run, "toy", "hard_sample", "cot_entropy")
        cells.append(f"{run} {x.mean():.3f} ± {x.std(ddof=1):.3f}")
    print(f"6. toy: entropy of the CoT, hard sampling, nats: {', '.join(cells)}")
    for run in runs:
        records = grid.found[run, "toy", "hard_sample"].values()
        profile = np.mean([record["entropy_by_position"][:6] for record in records], axis=0)
        print(f"   by position, {run}: {' '.join(f'{h:.2f}' for h in profile)}")
    base = grid.values("base", "toy", "hard_greedy")
    for name, claim in (
        ("soft-sigma0.1", "noise 0.1"), ("soft", "noise 0.33"), ("soft-sigma1", "noise 1"),
        ("soft-sigma3", "noise 3"), ("soft-hidden", "noise on the last hidden state"),
        ("soft-logits", "noise on the logits"), ("soft-topk-logits", "noise on the top 5 logits"),
    ):  # fmt: skip
        if (name, "toy", "hard_greedy") in grid.found:
            g = grid.gap(grid.values(name, "toy", "hard_greedy"), base)
            number = 8 if " on " in claim else 7
            print(f"{number}. toy: {claim}: hard greedy over the base {shown(g)}")


if __name__ == "__main__":
    main(sys.argv[1:])
