"""Does a model learn with soft tokens? Runs that fit the minutes one has, go on later, and add up.

    python results/real_model.py OUT --minutes 12 --model MODEL --task gsm8k --data-dir DIR \\
        --noise 1.0 --prompts 4 --samples 32 --max-cot 192 --steps 200 --lr 3e-6
    python results/real_model.py OUT --report      # tables and OUT/report.png, of all that is there

Other flags are those of softcot.py. Training questions are those that the base solves in 10 to 90 %
of hard samples (OUT/questions.json). Then, in this order, from one base with one seed: soft tokens
with the noise --noise, hard ones, --noise with the answers' score alone, with both scores whose
gradients are clipped apart, with rewards that are another prompt's (nothing can be learnt: what
does noise alone do?), 0.33, fuzzy, --noise with the CoT's score alone. Each is evaluated at
steps 0, 25, 50, 100, ... on the first test problems: hard greedy and hard sampling, a multiple
choice, and the distance from the base (KL of next tokens on worked solutions). What is there
already, in OUT, is not done again; a run that ran out of its minutes goes on from its state.
The --data-dir also needs hellaswag/validation.jsonl, or --choices 0. Without network, GSM8K needs
Math-Verify beside the data: install it by `pip install --target DIR math-verify` where there is one, and
set PYTHONPATH=DIR.
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import softcot
import toy_tasks
from results import choices
from softcot import SETTINGS, Config, Policy

RUNS = {  # mode, noise factor (None: --noise), which score is trained
    "soft": ("soft", None, "both"),
    "hard": ("hard", None, "both"),
    "answers": ("soft", None, "answers"),
    "apart": ("soft", None, "apart"),
    "shuffled": ("soft", None, "shuffled"),
    "soft-0.33": ("soft", 0.33, "both"),
    "fuzzy": ("fuzzy", 0.33, "both"),
    "cot": ("soft", None, "cot"),
}
CHECKS = (0, 25, 50, 100, 150, 200, 300, 400, 600, 800, 1000)  # steps that are evaluated
TRIES = 8  # samples of a question, to choose it
ROWS = 512  # of a batch, where nothing is trained
TEXTS = 32  # worked solutions on which the distance from the base is measured
STYLE = dict(zip(["base", *RUNS], ("#7f7f7f", "#d55e00", "#0072b2", "#cc79a7", "#000000", "#a6761d", "#e69f00", "#009e73", "#56b4e9")))


class OutOfTime(Exception):
    """The minutes are over; what had been done is saved."""


class Clock:
    """How much time is left."""

    def __init__(self, minutes: float):
        self.end = time.perf_counter() + 60 * minutes

    def need(self, seconds: float) -> None:
        """OutOfTime unless there are so many."""
        if time.perf_counter() + seconds > self.end:
            raise OutOfTime


@contextmanager
def score_of(which: str):
    """Train with the log-probabilities of "both", of "cot" or "answers" alone, or of both "apart".

    shuffled: of both, with another prompt's rewards, so that the gradient is nothing but noise."""
    real = softcot.log_probs, softcot.policy_gradient, softcot.rloo_advantages

    def some(policy, r):
        """log_probs() with the gradient of a part."""
        cot, answer, moved = real[0](policy, r)
        return (cot.detach() if which == "answers" else cot,
                answer.detach() if which == "cot" else answer, moved)  # fmt: skip

    def apart(policy, r, advantages, micro_batch=None):
        """policy_gradient() with the gradient of each part clipped by itself: neither drowns the other."""
        weights = [w for w in policy.model.parameters() if w.requires_grad]
        total = [torch.zeros_like(w) for w in weights]
        for part in ("cot", "answers"):
            with score_of(part):
                stats = real[1](policy, r, advantages, micro_batch)
            torch.nn.utils.clip_grad_norm_(weights, softcot.MAX_GRAD_NORM)
            for sum_of_both, w in zip(total, weights):
                sum_of_both += w.grad if w.grad is not None else 0
                w.grad = None
        for sum_of_both, w in zip(total, weights):
            w.grad = sum_of_both
        return stats

    if which == "apart":
        softcot.policy_gradient = apart
    elif which == "shuffled":
        softcot.rloo_advantages = lambda rewards: real[2](rewards.roll(1, 0))
    else:
        softcot.log_probs = some
    try:
        yield
    finally:
        softcot.log_probs, softcot.policy_gradient, softcot.rloo_advantages = real


def questions(policy: Policy, config: Config, out: Path, count: int) -> list[softcot.Problem]:
    """Of the first training questions those that the base solves now and then; kept in OUT."""
    problems = softcot.fitting(policy, softcot.load_problems(config, config.task, "train"), config)
    file = out / "questions.json"
    if file.exists():
        known = json.loads(file.read_bytes())
        same = known["model"] == config.model and known["task"] == config.task
        softcot.require(same, f"{file} is of {known['model']} and {known['task']}: take another OUT")
    else:
        chosen, size = [], max(1, ROWS // TRIES)
        how = (SETTINGS["hard_sample"], config.max_cot, config.max_answer, 1.0)
        for i in range(0, min(count, len(problems)), size):
            some = problems[i : i + size][: count - i]
            _, rewards = softcot.rewarded(policy, some, TRIES, (config.seed, 7), *how)
            share = (rewards == 100).mean(axis=1)
            chosen += [p.id for p, s in zip(some, share) if 0.1 <= s <= 0.9]
        tried = min(count, len(problems))
        softcot.write_json(file, {"model": config.model, "task": config.task, "of": tried, "ids": chosen})
    known = json.loads(file.read_bytes())
    ids = set(known["ids"])
    print(f"{len(ids)} of {known['of']} training questions are solved in 10 to 90 % of samples")
    return [problem for problem in problems if problem.id in ids]


def solutions(config: Config) -> list[tuple[str, str]]:
    """Prompts and worked solutions of test problems, as the model would write them."""
    rows = softcot.read_rows(config, config.task, "test")[:TEXTS]
    if config.task == "toy":
        sums = [[int(n) for n in row["question"][:-1].split("+")] for row in rows]
        totals = [" ".join(map(str, np.cumsum(terms)[1:])) for terms in sums]
        return [(row["question"], f"{thought} {softcot.STOP}{softcot.BOX}{row['answer']}}}")
                for row, thought in zip(rows, totals)]  # fmt: skip
    prompt = softcot.task_named(config.task).prompt
    texts = []
    for row in rows:
        solution = str(row["solution"] if "solution" in row else row["answer"])
        solution = re.sub("<<.*?>>", "", solution).partition("####")[0].strip()  # marks of GSM8K
        texts.append((prompt.replace("QUESTION", row.get("question", row.get("problem"))), f" {solution}"))
    return texts


@torch.no_grad()
def distance(base: Policy, policy: Policy, texts: list[tuple[str, str]]) -> float:
    """Mean KL(base || policy) of the next token over the tokens of the solutions, in nats.

    texts: prompts, of whose own tokens nobody asks, and solutions."""
    total, count = 0.0, 0
    for prompt, solution in texts:
        first = base.tokenize([prompt])[0].shape[1]
        ids, _ = base.tokenize([prompt + solution])
        with policy.arithmetic():
            hidden = (m.model.base_model(ids).last_hidden_state[:, first - 1 : -1] for m in (base, policy))
            p, q = (torch.log_softmax(m.head(h), -1) for m, h in zip((base, policy), hidden))
        total += (p.exp() * (p - q)).sum().item()
        count += p.shape[1]
    return total / count


def choice_of(config: Config) -> str:
    """The multiple choice that is asked of a model."""
    return "hellaswag" if config.model else "toy-walk"


def evaluation(policy: Policy, base: Policy, config: Config, given) -> dict:
    """Everything that is said of a checkpoint."""
    wide = dataclasses.replace(config, prompts=max(1, ROWS // config.samples))
    problems = softcot.load_problems(config, config.task, "test")[: given.problems]
    problems = softcot.fitting(policy, problems, config)
    scores = {}
    for name in ("hard_greedy", "hard_sample"):
        found = softcot.evaluate(policy, problems, SETTINGS[name], wide, given.eval_samples)
        scores[name] = {k: v for k, v in found.items() if k != "correct"}
        scores[name]["correct"] = found["correct"]
    if given.choices:
        choice = choice_of(config)
        scores[choice] = choices.evaluate_choices(policy, choice, given.rows)
    scores["kl"] = distance(base, policy, given.texts)
    policy.engine = None  # training has fewer rows, and other uses for that memory
    return scores


def train_run(name: str, given, flags: list[str], out: Path, clock: Clock, base: Policy) -> None:
    """One run, from where it stands to its last step or until the time is over."""
    mode, noise, which = RUNS[name]
    noise = [] if mode == "hard" else ["--sigma-scale", str(noise or given.noise)]
    config = softcot.filled(softcot.parse([*flags, "--cot", mode, *noise]))
    key = {"run": name, "seed": config.seed, "lr": config.lr, "noise": config.sigma_scale}
    key |= {k: getattr(config, k) for k in ("prompts", "samples", "steps")}
    asked = {k: getattr(config, k) for k in ("model", "task", "max_cot", "eval_max_cot")}
    asked |= {"problems": given.problems, "eval_samples": given.eval_samples}  # the same for a base
    label = f"{name}-noise{config.sigma_scale or 0:g}-s{config.seed}-lr{config.lr:g}"
    label += f"-{config.prompts}x{config.samples}-T{config.max_cot}-n{config.steps}"
    key |= asked
    records, metrics, state = out / "records.jsonl", out / f"{label}.jsonl", out / f"{label}.pt"
    seen = [row for row in softcot.read_log(records) if key.items() <= row.items()]
    if any(row["step"] == config.steps for row in seen):
        return
    policy = softcot.load_policy(config, given.folder)
    problems = questions(policy, config, out, given.questions)
    optimizer = softcot.make_optimizer(policy, config)
    done = 0
    if state.exists():
        done, _ = softcot.load_state(state, policy, optimizer)
    softcot.read_log(metrics, done)
    slowest = given.slowest  # of all runs: seconds of a step, of an evaluation
    try:
        with score_of(which):
            for step in range(done, config.steps + 1):
                done, start = step, time.perf_counter()
                if step in CHECKS or step == config.steps:
                    clock.need(slowest["evaluation"])
                    if not any(row["step"] == step for row in seen):
                        of_base = [row for row in softcot.read_log(records)
                                   if row["step"] == step == 0 and asked.items() <= row.items()]  # fmt: skip
                        if of_base:
                            scores = of_base[0]
                        else:
                            scores = evaluation(policy, base, config, given)
                            seconds = time.perf_counter() - start
                            slowest["evaluation"] = max(slowest["evaluation"], seconds)
                        softcot.append_jsonl(records, {**scores, **key, "score": which, "step": step})
                        say(label, step, scores)
                    start = time.perf_counter()
                if step < config.steps:
                    clock.need(2 * slowest["step"])
                    batch = softcot.prompts_of_step(problems, step, config.prompts, config.seed)
                    row, _, _ = softcot.train_step(policy, batch, step, config, optimizer)
                    softcot.append_jsonl(metrics, row)
                    slowest["step"] = max(slowest["step"], time.perf_counter() - start)
    except OutOfTime:
        softcot.save_state(state, policy, optimizer, done, 0.0)
        print(f"{label}: out of time at step {done}", flush=True)
        raise
    state.unlink(missing_ok=True)


def say(label: str, step: int, scores: dict) -> None:
    """A line of what was found."""
    greedy, sample = scores["hard_greedy"]["k"], scores["hard_sample"]["k"]
    print(f"{label}, step {step}: hard greedy {greedy['1']:.3f}, hard sample"
          f" {' '.join(f'@{k} {v:.3f}' for k, v in sample.items())}, KL {scores['kl']:.4f}", flush=True)  # fmt: skip


def figures(row: dict) -> dict[str, float]:
    """What is shown of a checkpoint."""
    greedy, sample = row["hard_greedy"], row["hard_sample"]
    nll = [row[name]["nll"] for name in ("hellaswag", "toy-walk") if name in row]
    return {
        "hard greedy": greedy["k"]["1"], "hard sample @1": sample["k"]["1"],
        f"@{sample['n']}": sample["k"][str(sample["n"])], "CoT entropy, nats": sample["cot_entropy"],
        "KL from the base": row["kl"], "choice NLL": nll[0] if nll else np.nan,
    }  # fmt: skip


def kind(row: dict) -> tuple:
    """All but the seed that tells a run from others: its name first, its learning rate last."""
    return tuple(row.get(k) for k in ("run", "noise", "max_cot", "steps", "prompts", "samples", "lr"))


def means(rows: list[dict]) -> None:
    """Print the last checkpoint of each kind of run and the base: mean and deviation over seeds."""
    names = list(figures(rows[0]))
    print(f"\n| run | noise | B x G | lr | step | seeds | {' | '.join(names)} |\n|{'---|' * (6 + len(names))}")
    trained = [row for row in rows if row["step"]]
    # one evaluation of the base is copied to all runs
    groups = {("base", 0): list({str(row["hard_sample"]["correct"]): row for row in rows if not row["step"]}.values())}
    for one in dict.fromkeys(map(kind, trained)):
        last = max(row["step"] for row in trained if kind(row) == one)
        groups[one, last] = [row for row in trained if kind(row) == one and row["step"] == last]
    for (one, step), some in groups.items():
        values = np.array([list(figures(row).values()) for row in some])
        texts = [f"{mean:.3f}" for mean in values.mean(axis=0)]
        if len(some) > 1:
            texts = [f"{text} ± {sd:.3f}" for text, sd in zip(texts, values.std(axis=0, ddof=1))]
        run, noise, _, _, B, G, lr = (one, None, 0, 0, 0, 0, 0) if one == "base" else one
        how = f"{noise or 0:g} | {B} x {G} | {lr:g}" if step else " | | "
        print(f"| {run} | {how} | {step} | {len(some)} | {' | '.join(texts)} |")


def report(out: Path) -> None:
    """Tables of all checkpoints and of the last ones, and pass@k by distance from the base."""
    rows = softcot.read_log(out / "records.jsonl")
    print("| run | seed | lr | step | hard greedy | hard sample @1 | @most | entropy, nats | KL from the base"
          " | choice NLL |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    rates = list(dict.fromkeys(row["lr"] for row in rows))
    lines = {lr: ("o-", "s--", "^:", "D-.")[i % 4] for i, lr in enumerate(rates)}
    for one, seed in dict.fromkeys((kind(row), row["seed"]) for row in rows):
        some = [row for row in rows if (kind(row), row["seed"]) == (one, seed)]
        run = one[0], seed, one[-1]
        points = []
        for row in sorted(some, key=lambda row: row["step"]):
            greedy, sample = row["hard_greedy"], row["hard_sample"]
            most = str(sample["n"])
            points.append((row["step"], row["kl"], greedy["k"]["1"], sample["k"]["1"], sample["k"][most]))
            texts = [f"{s['k'][k]:.3f} ± {s['k_error'][k]:.3f}" for s, k in
                     ((greedy, "1"), (sample, "1"), (sample, most))]  # fmt: skip
            nll = [f"{row[k]['nll']:.3f}" for k in ("hellaswag", "toy-walk") if k in row]
            print(f"| {run[0]} | {run[1]} | {run[2]:g} | {row['step']} | {' | '.join(texts)} |"
                  f" {sample['cot_entropy']:.3f} | {row['kl']:.4f} | {' '.join(nll)} |")  # fmt: skip
        steps, kl, greedy, one, most = zip(*points)
        for axes, x, y in zip(panels, (steps, one, kl), (greedy, most, most)):
            axes.plot(x, y, lines[run[2]], markersize=4, color=STYLE[run[0]], alpha=0.8)
    most_k = rows[0]["hard_sample"]["n"]
    for name, lr in dict.fromkeys((row["run"], row["lr"]) for row in rows):
        label = name if len(rates) == 1 else f"{name}, lr {lr:g}"
        panels[1].plot([], [], lines[lr], markersize=4, color=STYLE[name], label=label)
    panels[0].set(xlabel="step", ylabel="hard greedy pass@1")
    panels[1].set(xlabel="hard sample pass@1", ylabel=f"hard sample pass@{most_k}")
    panels[2].set(xlabel="KL from the base (nats a token)", ylabel=f"hard sample pass@{most_k}")
    panels[1].legend(fontsize=8, loc="lower right")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(out / "report.png", dpi=110)
    means(rows)


def main(arguments=None) -> None:
    """The runs, or the report of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--noise", type=float, default=1.0, help="the factor that results/snr.py recommends")
    parser.add_argument("--questions", type=int, default=1024, help="of the training split that are tried")
    parser.add_argument("--problems", type=int, default=128, help="of the test split")
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--choices", type=int, default=64, help="questions of the multiple choice; 0: none")
    parser.add_argument("--report", action="store_true")
    given, flags = parser.parse_known_args(arguments)
    if given.report:
        return report(given.out)
    clock, given.slowest = Clock(given.minutes), {"step": 0.0, "evaluation": 0.0}
    given.out.mkdir(parents=True, exist_ok=True)
    config = softcot.filled(softcot.parse(flags))
    given.folder = config.model or str(toy_tasks.base_model(Path("runs/toy-base")))
    torch.set_num_threads(config.threads)
    given.texts = solutions(config)  # what is missing is missed before anything is sampled
    given.rows = given.choices and choices.read_rows(choice_of(config), config.data_dir, given.choices)
    base = softcot.load_policy(config, given.folder)
    try:
        for name in given.runs:
            train_run(name, given, flags, given.out, clock, base)
    except OutOfTime:
        print("The same command goes on.")


if __name__ == "__main__":
    main()
