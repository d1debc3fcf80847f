"""A picture that moves: 32 soft CoTs of one sum, position by position, before and after training.

    python results/walk.py                 # results/walk.gif, of what `python softcot.py` leaves
    python results/walk.py BASE TRAINED    # of the toy in two other folders

A soft token is a point in the D dimensions of the embeddings; a linear map draws it in two. The map
is chosen so that the running totals of the sum stand in a row, with the token that stops a CoT
above them: to go on is to walk to the right, to stop is to climb. A linear map keeps mixtures:
halfway between two tokens is half of each. Of the noise one sees what the map leaves of it, in two
directions; there is as much of it in each of the D - 2 others, and all of it acts on the model.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import softcot
from softcot import COLORS, Policy, Rollout

SUM = "1+1+4+3+4+4"  # of the first 128 test problems the one on which the base differs most
SAMPLES, MAX_COT = 32, 9
WORD = "The final answer is:"  # the token that stops a CoT
HEIGHT = 2.6  # of that token above the totals, which are 1 apart
SECONDS = 1.5  # a position
KEY = "black: mixture h", "line and dot: its noise, x = h + σε", "ring: a CoT that has stopped"


def sampled(folder: str, question: str, max_cot: int) -> tuple[Policy, Rollout]:
    """A model and its soft CoTs of a question, with greedy answers; every model has one noise."""
    config = softcot.filled(softcot.Config(device="cpu"))
    policy = softcot.load_policy(config, folder)
    seeds = softcot.row_seeds([(0, 7, n) for n in range(SAMPLES)])
    how = (softcot.SETTINGS["soft_sample"], max_cot, config.max_answer, 0.0)
    return policy, softcot.rollout(policy, [question] * SAMPLES, seeds, *how)


def places(totals: list[int]) -> Tensor:
    """Where the totals and, last, the token that stops are drawn: [totals + 1, 2]."""
    middle = (len(totals) - 1) / 2
    return torch.tensor([[i - middle, 0.0] for i in range(len(totals))] + [[0.0, HEIGHT]])


def plane(policy: Policy, totals: list[int]) -> Tensor:
    """The linear map [D, 2] that puts these tokens on their places.

    Of all such maps the smallest, which does not look where none of these tokens is."""
    vocab = policy.tokenizer.get_vocab()
    tokens = [vocab[f"{total} "] for total in totals] + [vocab[WORD]]
    return torch.linalg.pinv(policy.embeddings().detach()[tokens]) @ places(totals)


def draw_tokens(axes, totals: list[int], stops: list[int], color: str) -> None:
    """The tokens, the way from each total to a stop, and how many CoTs stopped behind each."""
    *row, top = places(totals).tolist()
    left = (row[0][0] - 0.25, 0.0)
    how = dict(textcoords="offset points", va="top")
    axes.annotate("go on →", left, (0, -13), fontsize=10, ha="right", **how)
    axes.annotate("stopped:", left, (0, -29), fontsize=10, ha="right", color=color, **how)
    for where, total, count in zip(row, totals, stops):
        axes.plot(*zip(where, top), color="#e4e4e4", linewidth=0.8, zorder=0)
        axes.annotate(str(total), where, (0, -13), fontsize=11, ha="center", **how)
        text = str(count) if count else ""
        axes.annotate(text, where, (0, -29), color=color, weight="bold", ha="center", **how)
    axes.plot(*zip(*row, top), "s", color="black", fillstyle="none", markersize=9)
    how = dict(textcoords="offset points", va="bottom", ha="center")
    axes.annotate(f"stop: “{WORD}”", top, (0, 15), fontsize=11, **how)


def draw(axes, r: Rollout, to_plane: Tensor, t: int, color: str) -> None:
    """The CoTs at position t: those that think, and the last soft token of those that stopped."""
    x = r.cot.x @ to_plane  # [N, T, 2]
    h = (r.cot.x - r.sigma * r.cot.eps) @ to_plane  # [N, T, 2]
    last = r.cot.mask.sum(1) - 1  # [N]
    before = (last < t).nonzero().flatten()
    dot = dict(marker="o", markersize=5, color=color)
    axes.plot(*x[before, last[before]].T, fillstyle="none", linestyle="", alpha=0.6, **dot)
    for n in (last >= t).nonzero().flatten().tolist():
        if t:
            axes.plot(*zip(x[n, t - 1], h[n, t]), color=color, linewidth=0.6, alpha=0.25)
        axes.plot(*zip(h[n, t], x[n, t]), color=color, linewidth=1.2, zorder=3)
        axes.plot(*x[n, t], markeredgewidth=0, zorder=3, **dot)
        axes.plot(*h[n, t], ".", color="black", markersize=4, zorder=4)


def frame(figure: Figure, panels: dict, terms: str, totals: list[int], t: int, T: int) -> None:
    """Position t of T: one panel a model."""
    figure.clear()
    figure.suptitle(f"{SAMPLES} soft CoTs of {terms}, position {t + 1} of {T}", y=0.97, fontsize=13)
    figure.text(0.5, 0.025, (8 * " ").join(KEY), fontsize=9, color="#595959", ha="center")
    for i, (name, (r, to_plane, color)) in enumerate(panels.items()):
        axes = figure.add_axes((0.01 + 0.5 * i, 0.07, 0.48, 0.76))
        axes.set(xlim=(-3.1, 2.5), ylim=(-0.9, HEIGHT + 0.6), aspect="equal")
        axes.set_axis_off()
        length = r.cot.mask.sum(1).tolist()
        ended = [n for n in range(SAMPLES) if r.stopped[n] and length[n] <= t + 1]
        after = [length[n] - 2 for n in ended]  # behind which total; more than there are: the last
        stops = [sum(min(a, len(totals) - 1) == k for a in after) for k in range(len(totals))]
        right = sum(softcot.boxed(r.answers[n]) == str(totals[-1]) for n in ended)
        axes.set_title(f"{name}: {len(ended)} stopped, {right} right", fontsize=11, color=color)
        draw_tokens(axes, totals, stops, color)
        draw(axes, r, to_plane, t, color)


def main(arguments=None) -> None:
    """Sample both models and write the picture: a frame for each position of the longest CoT."""
    how = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("base", nargs="?", default="runs/toy-base")
    parser.add_argument("trained", nargs="?", default="runs/toy-soft-s0/model")
    parser.add_argument("--sum", default=SUM, help=f"six numbers of 1 to 5 (default: {SUM})")
    parser.add_argument("--max-cot", type=int, default=MAX_COT, help="longest CoT in tokens")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".gif")))
    given = parser.parse_args(arguments)
    totals = list(itertools.accumulate(map(int, given.sum.split("+"))))[1:]
    panels = {}
    for name, folder, color in (("before training", given.base, COLORS["base"]),
                                ("after training", given.trained, COLORS["soft"])):  # fmt: skip
        policy, r = sampled(folder, given.sum + "=", given.max_cot)
        panels[name] = (r, plane(policy, totals), color)
    T = max(r.cot.mask.shape[1] for r, *_ in panels.values())
    figure, writer = Figure(figsize=(8.4, 3.9)), PillowWriter(fps=1 / SECONDS)
    with writer.saving(figure, given.out, dpi=100):
        for t in range(T):
            frame(figure, panels, given.sum, totals, t, T)
            writer.grab_frame()


if __name__ == "__main__":
    try:
        main()
    except softcot.UserError as error:  # a folder without a model
        sys.exit(f"walk.py: error: {error}")
