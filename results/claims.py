"""The paper's claims on the toy, one verdict each: python results/claims.py > results/claims.md

Reads results/toy.jsonl, what results/toy_grid.sh has recorded. Prints Markdown, and draws results/toy.png. Every difference is that of means over seeds, with a 95 % bootstrap
interval over the test problems and the seeds, both drawn anew 2,000 times (with so few seeds a little too narrow). A claim fails
if the interval lies below 0. Else, that A is no worse than B holds if it lies above -5 points, that A is better if it
lies above 0; what is neither is not shown.
"""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

from softcot import COLORS

RECORDS = Path(__file__).with_name("toy.jsonl")
COTS = ("hard", "fuzzy", "soft")
SUMS = ("toy", "toy-large", "toy-round")
SETTINGS = [f"{cot}_{how}" for cot in COTS for how in ("greedy", "sample")]


def load(runs: list[dict]) -> dict:
    """(run without its seed, stage, task, setting) -> {seed: record of eval.json}."""
    found = {}
    for run in runs:
        name, seed = run["run"].rsplit("-s", 1)
        for row in run["eval"]:
            bases = {"soft": "base", "fuzzy": "base, tau 0.1", "words0-logits": "base-words"}
            # Many runs evaluated the same base; but fuzzy settings have the temperature of the run.
            of = bases.get(name, f"base of {name}") if row["stage"] == "base" else name
            found.setdefault((of, row["task"], row["setting"]), {})[int(seed)] = row
    return found


def pass_at_k(record: dict, k: int) -> np.ndarray:
    """pass@k of each problem [problems], from the number of right samples."""
    n, k = record["n"], min(k, record["n"])
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in record["correct"]])


class Grid:
    """The records, and the statistics that the claims need."""

    def __init__(self, runs: list[dict]):
        self.runs, self.found, self.rng = runs, load(runs), np.random.default_rng(0)

    def metric(self, name: str, key: str) -> np.ndarray:
        """A column of metrics.jsonl of the runs of a name [seeds, steps]."""
        named = [run for run in self.runs if run["run"].rsplit("-s", 1)[0] == name]
        return np.array([run["metrics"][key] for run in named])

    def values(self, run: str, task: str, setting: str, k: int = 1) -> np.ndarray:
        """pass@k in % [seeds, problems]."""
        records = self.found[run, task, setting]
        return 100 * np.stack([pass_at_k(records[seed], k) for seed in sorted(records)])

    def cell(self, *where) -> str:
        """Mean and standard deviation over seeds, of pass@k."""
        means = self.values(*where).mean(1)
        return f"{means.mean():.1f} ± {means.std(ddof=1):.1f}"

    def gap(self, a: np.ndarray, b: np.ndarray, paired=False) -> tuple[float, float, float]:
        """Mean of a - b, both [seeds, problems], and its bootstrap interval; paired: of the same models."""
        problems = self.rng.integers(a.shape[1], size=(2000, 1, a.shape[1]))
        seeds = [self.rng.integers(len(x), size=(2000, len(x), 1)) for x in (a, b)]
        seeds = [seeds[0]] * 2 if paired else seeds
        draws = a[seeds[0], problems].mean((1, 2)) - b[seeds[1], problems].mean((1, 2))
        return a.mean() - b.mean(), *np.percentile(draws, [2.5, 97.5])


def verdict(low: float, high: float, margin: float) -> str:
    """What an interval says of a difference that is claimed to be above -margin."""
    return "fails" if high < 0 else "holds" if low > -margin else "not shown"


def shown(gap: tuple[float, float, float]) -> str:
    """A difference in points with its interval."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gap)


def training(grid: Grid, name: str) -> str:
    """Success in the first and in the last ten steps, in %, the last of each seed; gradient norm in the first."""
    success = 100 * grid.metric(name, "success")
    norm = grid.metric(name, "grad_norm")[:, :10].mean()
    last = " ".join(f"{x:.1f}" for x in success[:, -10:].mean(1))
    return f"success in training {success[:, :10].mean():.1f} -> {last}, gradient norm {norm:,.0f} at first"


def scalar(grid: Grid, run: str, task: str, setting: str, key: str) -> np.ndarray:
    """A number of eval.json [seeds]."""
    records = grid.found[run, task, setting]
    return np.array([records[seed][key] for seed in sorted(records)])


def draw(grid: Grid, path: Path) -> None:
    """Success and CoT length in training, means of five steps, and pass@k out of domain."""
    figure = Figure(figsize=(11.5, 3.4), layout="constrained")
    panels = {"success": "success rate, each with its own CoT", "cot_len": "CoT length (tokens)"}
    *training, beyond = figure.subplots(1, 3)
    lines = {"base": ":", "hard": "--", "fuzzy": "-.", "soft": "-"}

    def curve(axes, x, values, run: str, shift: float) -> None:
        """Mean over the seeds [seeds, len(x)], their range, and the name at the end, shifted by points."""
        axes.plot(x, values.mean(0), linestyle=lines[run], color=COLORS[run])
        axes.fill_between(x, values.min(0), values.max(0), color=COLORS[run], alpha=0.2, lw=0)
        end = (x[-1], values.mean(0)[-1])
        axes.annotate(run, end, (5, shift), textcoords="offset points", color=COLORS[run])

    for axes, (key, label) in zip(training, panels.items()):
        for cot, shift in zip(COTS, (-2, -12, 8)):
            values = grid.metric(cot, key)
            smooth = np.array([np.convolve(v, np.ones(5) / 5, mode="valid") for v in values])
            curve(axes, np.arange(5, values.shape[1] + 1), smooth, cot, shift)
        axes.set(xlabel="training step", ylabel=label, xlim=(0, 122))
    for run, shift in zip(("base", *COTS), (8, -4, -2, -12)):
        ks = [2**i for i in range(6)]
        values = [grid.values(run, "toy-round", "hard_sample", k).mean(1) / 100 for k in ks]
        curve(beyond, ks, np.array(values).T, run, shift)
    beyond.set_xscale("log", base=2)
    beyond.xaxis.set_major_formatter("{x:.0f}")
    beyond.set(xlabel="k (samples, hard tokens)", ylabel="pass@k, toy-round", xlim=(0.9, 60))
    beyond.set_xticks(ks)
    for axes in (*training, beyond):
        axes.margins(y=0.12)
        axes.grid(alpha=0.3)
    seeds = len(grid.metric("soft", "success"))
    figure.suptitle(f"The toy in training, and where its lesson is wrong: mean and range of {seeds} seeds")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Print the tables and the verdicts, draw the figure."""
    grid = Grid([json.loads(line) for line in RECORDS.read_text().splitlines()])
    draw(grid, Path(__file__).parent / "toy.png")
    runs = ["base", *COTS]
    print("Fuzzy settings have temperature 0.1 for the fuzzy-trained, 0.0001 elsewhere.\n")
    for task in SUMS:
        print(f"### {task}: pass@1 / pass@32 in %, mean ± standard deviation over seeds\n")
        print("| trained with |", " | ".join(SETTINGS), "| CoT length, hard greedy |")
        print("|---" * (len(SETTINGS) + 2) + "|")
        for run in ["base", "base, tau 0.1", *COTS]:
            cells = []
            for setting in SETTINGS:
                many = "" if setting.endswith("greedy") else " / " + grid.cell(run, task, setting, 32)
                cells.append(grid.cell(run, task, setting) + many)
            length = scalar(grid, run, task, "hard_greedy", "cot_len").mean()
            print(f"| {run} |", " | ".join(cells), f"| {length:.1f} |")
        print()
    print("### The claims\n")
    for task in SUMS:
        for cot in ("soft", "fuzzy"):
            a, b = (grid.values(x, task, "hard_greedy") for x in (cot, "hard"))
            g = grid.gap(a, b)
            ok = verdict(*g[1:], 5)
            print(f"1. {task}: {cot} training is no worse than hard at greedy pass@1: {shown(g)}: {ok}")
        for cot in ("soft", "fuzzy"):
            a, b = (grid.values(x, task, "hard_sample", 32) for x in (cot, "hard"))
            g = grid.gap(a, b)
            print(f"2. {task}: {cot} training beats hard at pass@32: {shown(g)}: {verdict(*g[1:], 0)}")
        words = []
        for cot in COTS:
            a, b = (grid.values(x, task, "hard_sample", 32) for x in (cot, "base"))
            words.append(f"{cot} {shown(grid.gap(a, b))}")
        print(f"2. {task}: trained less base at pass@32: {', '.join(words)}")
        for run, (how, k) in itertools.product(COTS, (("greedy", 1), ("sample", 1), ("sample", 32))):
            words = []
            for other in ("soft", "fuzzy"):
                pair = (grid.values(run, task, f"{cot}_{how}", k) for cot in ("hard", other))
                g = grid.gap(*pair, paired=True)
                words.append(f"{other}_{how} {shown(g)}: {verdict(*g[1:], 5)}")
            number = "3, 4" if run == "hard" else "3"
            claim = f"{run}-trained, hard_{how} is no worse at pass@{k}"
            print(f"{number}. {task}: {claim} than {', '.join(words)}")
    cells = []
    for run in runs:
        x = scalar(grid, run, "toy-walk", "teacher_forced", "nll")
        cells.append(f"{run} {x.mean():.3f} ± {x.std(ddof=1):.3f}")
    least = f"(the least possible: {math.log(2):.3f})"
    print(f"5. toy-walk: NLL in nats per token: {', '.join(cells)} {least}")
    cells = []
    for run in runs:
        x = scalar(grid, run, "toy", "hard_sample", "cot_entropy")
        cells.append(f"{run} {x.mean():.3f} ± {x.std(ddof=1):.3f}")
    print(f"6. toy: entropy of the CoT, hard sampling, nats: {', '.join(cells)}")
    for run in runs:
        records = grid.found[run, "toy", "hard_sample"].values()
        profile = np.mean([record["entropy_by_position"][:6] for record in records], axis=0)
        print(f"   by position, {run}: {' '.join(f'{h:.2f}' for h in profile)}")
    where = {"embedding": "the embedding", "hidden": "the last hidden state"}
    where |= {"logits": "the logits", "topk-logits": "the top 5 logits"}
    runs = [(f"soft-sigma{x}", "base", f"7. toy: noise {x} on the embedding") for x in ("0.1", "1", "3")]
    runs += [("soft", "base", "7, 8. toy: noise 0.33 on the embedding")]
    runs += [(f"soft-{at}", "base", f"8. toy: noise on {where[at]}") for at in where]
    for words in (0, 1000, 4000, 16000):
        name, claim = f"words{words}", f"8. toy with {words:,} unused words: noise on"
        runs += [(f"{name}-{at}", "base-words", f"{claim} {where[at]}") for at in where]
    for name, base, claim in runs:
        if (name, "toy", "hard_greedy") in grid.found:
            a, b = (grid.values(run, "toy", "hard_greedy") for run in (name, base))
            print(f"{claim}: hard greedy {b.mean():.1f} -> {a.mean():.1f}, {shown(grid.gap(a, b))};")
            print(f"   {training(grid, name)}")


if __name__ == "__main__":
    main()
