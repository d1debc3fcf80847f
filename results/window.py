"""How much noise lets soft tokens learn? Toys of several widths, trained with several noise factors.

    python results/window.py                       # makes what results/window.jsonl lacks: hours
    python results/window.py --widths 64 --seeds 0     # a part of it: minutes
    python results/window.py --draw                # only results/window.png and the table

Each run pretrains a toy of a width and seed (once), samples it with and without the noise, and
trains it with soft tokens for 100 steps of 16 x 32 samples, all else as shipped. A run *learns* if
greedy hard decoding on the 128 test problems makes at least half of the way from the base to 1.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import softcot
import toy_tasks

RECORDS = Path(__file__).with_name("window.jsonl")
WIDTHS, FACTORS, SEEDS = (32, 64, 128, 256, 512), (0.05, 0.1, 0.2, 0.33, 0.5, 0.8, 1.33), (0, 1, 2)
WINDOW = 0.01, 0.85  # the rule: success with noise, over that without; found on seed 0, where
FOUND_ON = (0.05, 0.1, 0.2, 0.33, 1.33)  # it was trained with these (and 0.45, 0.66, 1.0)
COLORS = dict(zip(WIDTHS, ("#56b4e9", "#0072b2", "#009e73", "#e69f00", "#d55e00")))


def base_folder(width: int, seed: int) -> str:
    """The folder of the toy of a width; pretrains it the first time."""
    folder = Path(f"runs/window/base-{width}-{seed}")
    if not (folder / "tokenizer.json").exists():
        model, tokenizer = toy_tasks.pretrain(seed, width=width)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def train(width: int, factor: float, seed: int) -> dict:
    """Train one toy with one noise factor: its record."""
    base = base_folder(width, seed)
    with tempfile.TemporaryDirectory() as out:
        flags = f"--model {base} --seed {seed} --sigma-scale {factor} --prompts 16 --threads 1"
        flags += f" --eval-settings hard_greedy --out-dir {out} --device cpu"
        config = softcot.filled(softcot.parse(flags.split()))
        policy = softcot.load_policy(config, base)
        problems = softcot.load_problems(config, "toy", "train")[:64]
        found = {}
        for name in ("soft_greedy", "soft_sample"):
            setting = softcot.settings_of(config)[name]
            how = (setting, config.max_cot, config.max_answer, 1.0)
            _, rewards = softcot.rewarded(policy, problems, 32, (seed, 5), *how)
            found[name] = (rewards == 100).mean()
            mixed = (rewards != rewards[:, :1]).any(axis=1).mean()
        softcot.run(softcot.parse(flags.split()))
        rows = [json.loads(line) for line in open(Path(out) / "metrics.jsonl", "rb")]
        evals = json.loads((Path(out) / "eval.json").read_bytes())
    success = [row["success"] for row in rows]
    greedy = {row["stage"]: row["k"]["1"] for row in evals}
    return {
        "width": width, "factor": factor, "seed": seed,
        "base_without": found["soft_greedy"], "base_with": found["soft_sample"], "mixed": mixed,
        "first": np.mean(success[:10]), "last": np.mean(success[-10:]),
        "greedy_base": greedy["base"], "greedy": greedy["trained"],
        "grad_norm": np.median([row["grad_norm"] for row in rows]),
    }  # fmt: skip


def learns(row: dict) -> bool:
    """Whether training made at least half of the way to 1."""
    return row["greedy"] >= (1 + row["greedy_base"]) / 2


def inside(row: dict) -> bool:
    """Whether the rule expects that."""
    low, high = WINDOW
    return low <= row["base_with"] and row["base_with"] <= high * row["base_without"]


def draw(rows: list[dict]) -> None:
    """window.png: success after training by factor; the base's by factor; the one by the other."""
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    after, before, rule = figure.subplots(1, 3)
    for width in sorted({row["width"] for row in rows}):
        some = [row for row in rows if row["width"] == width]
        factors = sorted({row["factor"] for row in some})
        of = lambda value: [np.mean([value(r) for r in some if r["factor"] == f]) for f in factors]
        share = lambda row: row["base_with"] / max(row["base_without"], 1e-9)
        color = COLORS.get(width, "#7f7f7f")
        after.plot(factors, of(lambda row: row["greedy"]), "-", color=color, label=f"D = {width}")
        after.plot([r["factor"] for r in some], [r["greedy"] for r in some], ".", color=color)
        before.plot(factors, of(share), "-", color=color)
        before.plot([r["factor"] for r in some], [share(r) for r in some], ".", color=color)
        x, y = ([f(r) for r in some] for f in (share, lambda r: r["greedy"]))
        rule.plot(x, y, ".", color=color, markersize=8)
    base = np.mean([row["greedy_base"] for row in rows])
    titles = ((after, "after 100 steps", 0.02), (rule, "after 100 steps, by what the noise costs", 0.5))
    for axes, text, place in titles:
        axes.axhline(base, color="#7f7f7f", linestyle="--")
        axes.annotate("base", (place, base), xycoords=("axes fraction", "data"), va="top")
        axes.set(title=text, ylabel="success, hard greedy", ylim=(-0.03, 1.05))
    for axes in (after, before):
        axes.set(xscale="log", xlabel="noise factor (sigma over RMS of the embeddings)")
        axes.set_xticks(FACTORS, [str(f) for f in FACTORS])
        axes.minorticks_off()
    before.set(title="the base, before training", ylabel="success with noise / without")
    rule.axvspan(0, WINDOW[1], color="#009e73", alpha=0.12)
    rule.set(xlabel="the base's success with noise / without")
    rule.annotate("the rule", (WINDOW[1] / 2, 0.0), color="#009e73", ha="center")
    after.legend(fontsize=8)
    for axes in (after, before, rule):
        axes.grid(alpha=0.3)
    figure.savefig(RECORDS.with_suffix(".png"), dpi=110)


def table(rows: list[dict]) -> None:
    """Print each width and factor, mean ± deviation over seeds, and how often the rule was right."""
    print("| D | noise | base: without noise, with | groups mixed | training, first ten, last ten |"
          " hard greedy, base | after | learn | inside |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for key in sorted({(row["width"], row["factor"]) for row in rows}):
        some = [row for row in rows if (row["width"], row["factor"]) == key]
        mean = {name: np.mean([row[name] for row in some]) for name in some[0]}
        spread = f" ± {np.std([r['greedy'] for r in some], ddof=1):.2f}" if len(some) > 1 else ""
        print(f"| {key[0]} | {key[1]} | {mean['base_without']:.2f}, {mean['base_with']:.3f} |"
              f" {mean['mixed']:.2f} | {mean['first']:.2f}, {mean['last']:.2f} |"
              f" {mean['greedy_base']:.2f} | {mean['greedy']:.2f}{spread} |"
              f" {sum(map(learns, some))} of {len(some)} | {sum(map(inside, some))} |")  # fmt: skip
    used = [row["seed"] == 0 and row["factor"] in FOUND_ON for row in rows]
    for name, group in (("like those it was found on", True), ("others", False)):
        some = [row for row, known in zip(rows, used) if known == group]
        right = sum(inside(row) == learns(row) for row in some)
        wrong = [(r["width"], r["factor"], r["seed"]) for r in some if inside(r) != learns(r)]
        print(f"\nThe rule is right in {right} of {len(some)} runs {name}; not in {wrong}")
        for where in (True, False):
            group = [learns(row) for row in some if inside(row) == where]
            print(f"{'inside' if where else 'outside'}: {sum(group)} of {len(group)} learn")


def main(arguments=None) -> None:
    """Make the runs that are asked for and not there; then table and figure of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--draw", action="store_true", help="run nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # run it once for each core, with other widths
    for seed in given.seeds:
        for width in given.widths:
            for factor in given.factors if not given.draw else ():
                key = {"width": width, "factor": factor, "seed": seed}
                there = softcot.read_log(RECORDS)
                if not any(key.items() <= row.items() for row in there):
                    softcot.append_jsonl(RECORDS, train(width, factor, seed))
    rows = softcot.read_log(RECORDS)
    table(rows)
    draw(rows)


if __name__ == "__main__":
    main()
