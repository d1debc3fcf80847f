"""How much noise suits a model, and how much signal has the gradient? Minutes, for any model.

    python results/snr.py --model MODEL --task TASK --minutes 10 [flags of softcot.py]

First the base: its success with CoTs of each noise factor and the share of groups with mixed
outcomes, from which alone a step learns; the factor with the most mixed groups is recommended. Then
n0, of CoT and answers apart, for each mode: the number of samples at which a step's gradient is as
much signal as noise. Batches g_1 .. g_K of N samples each: the mean of g_i . g_j over i != j is
|E g|^2 without bias, the mean of |g_i|^2 is that plus the noise; n0 = N noise / signal. Intervals
are of one standard error, by leaving out one batch at a time. One object is appended to --out.
"""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import softcot
import toy_tasks
from softcot import Config, Policy, Setting

FACTORS = (0.0, 0.1, 0.33, 0.66, 1.0, 2.0)
SKETCH = 1_000_000  # numbers that are kept of a gradient
SHARE = 0.3  # of the time for the base's success


def n0(gradients: Tensor, N: int) -> dict:
    """Signal and noise of gradients [K, M], each the mean over N samples; K of 3 or more.

    n0 and its interval of one standard error (jackknife); infinite where there is no signal."""
    K, g = len(gradients), gradients.double()
    products = g @ g.T  # [K, K]

    def ratio(some: Tensor) -> float:
        """Signal over noise of the batches that some [K] says."""
        kept, k = products[some][:, some], int(some.sum())
        total = kept.diagonal().mean()
        signal = (kept.sum() - kept.diagonal().sum()) / (k * (k - 1))
        return (signal / (total - signal)).item()

    every = torch.ones(K, dtype=torch.bool)
    value = ratio(every)
    one_less = np.array([ratio(every & (torch.arange(K) != i)) for i in range(K)])
    error = ((K - 1) / K * np.square(one_less - one_less.mean()).sum()) ** 0.5
    samples = lambda x: N / x if x > 0 else math.inf
    low, high = samples(value + error), samples(value - error)
    return {"n0": samples(value), "low": low, "high": high, "K": K, "N": N,
            "norm": products.diagonal().mean().sqrt().item()}  # fmt: skip


class Sketch:
    """A gradient in M numbers, such that products of two gradients stay what they are, on average.

    Cut into pieces of M coordinates, which are added up with random signs, always the same. What two
    pieces have in common then cancels but for noise of |g| |g'| / sqrt(M). (To keep M coordinates
    and leave the others out does worse: a few of them can hold most of a gradient.) Exact where M
    is as large as the gradient."""

    def __init__(self, policy: Policy, size: int):
        self.weights = list(policy.model.parameters())
        self.M = min(size, sum(w.numel() for w in self.weights))
        generator = torch.Generator().manual_seed(0)
        signs = 2.0 * torch.randint(2, (2 * self.M,), generator=generator) - 1
        self.signs = signs.to(self.weights[0].device)
        pieces = sum(-(-w.numel() // self.M) for w in self.weights) + len(self.weights)
        self.offsets = torch.randint(self.M, (2 * pieces,), generator=generator).tolist()

    def take(self) -> Tensor:
        """The sketch [M] of the gradient, which is emptied."""
        total, place, offsets = torch.zeros_like(self.signs[: self.M]), 0, iter(self.offsets)
        for w in self.weights:
            gradient = torch.zeros_like(w) if w.grad is None else w.grad
            gradient, w.grad = gradient.flatten().float(), None
            while len(gradient):
                piece, gradient = gradient[: self.M - place], gradient[self.M - place :]
                first = next(offsets)
                total[place : place + len(piece)] += piece * self.signs[first : first + len(piece)]
                place = (place + len(piece)) % self.M
        return total.cpu()


def gradients(policy: Policy, r, advantages: Tensor, sketch: Sketch) -> dict[str, Tensor]:
    """The sketch [M] of the gradient of the CoT's log-probability and that of the answer's."""
    found = {"cot": 0.0, "answer": 0.0}
    columns = sum(x.shape[1] for x in (r.prompt_ids, r.cot.ids, r.prefill_ids, r.answer.ids))
    size = max(1, softcot.affordable_tokens(policy) // columns)
    for index in filter(len, advantages.nonzero().flatten().split(size)):
        advantage = advantages[index]
        cot, answer, _ = softcot.log_probs(policy, softcot.rows_of(r, index))
        for name, logp, keep in (("answer", answer, True), ("cot", cot, False)):
            loss = -(advantage * logp.sum(1)).sum() / len(advantages)
            loss.backward(retain_graph=keep)
            found[name] = found[name] + sketch.take()
    return found


class Lab:
    """A model, its problems, and the clock."""

    def __init__(self, config: Config, minutes: float):
        self.config, self.minutes, self.start = config, minutes, time.perf_counter()
        base = config.model or str(toy_tasks.base_model(Path("runs/toy-base")))
        self.policy = softcot.load_policy(config, base)
        found = softcot.load_problems(config, config.task, "train")
        self.problems = softcot.fitting(self.policy, found, config)

    def passed(self) -> float:
        """The share of the time that is over."""
        return (time.perf_counter() - self.start) / (60 * self.minutes)

    def sample(self, setting: Setting, step: int):
        """A training step's rollout, and its rewards [B, G]."""
        config = self.config
        batch = softcot.prompts_of_step(self.problems, step, config.prompts, config.seed)
        how = (setting, config.max_cot, config.max_answer, 1.0)
        return softcot.rewarded(self.policy, batch, config.samples, (config.seed, 6, step), *how)

    def success_by_noise(self) -> list[dict]:
        """The base's success and mixed groups with each factor, and with hard tokens."""
        soft = softcot.settings_of(self.config)["soft_sample"]  # with --tau
        settings = {f"soft {f:g}": dataclasses.replace(soft, noise=f) for f in FACTORS}
        settings["hard"] = softcot.SETTINGS["hard_sample"]
        seen, step = {name: ([], [], []) for name in settings}, 0  # right [B, G], texts, lengths
        while step == 0 or self.passed() * (step + 1) / step < SHARE:
            for name, setting in settings.items():
                r, rewards = self.sample(setting, step)
                found = (rewards == 100, r.cots, r.cot.mask.sum(1).float().mean().item())
                for kept, value in zip(seen[name], found):
                    kept.append(value)
            step += 1
        rows, G = [], self.config.samples
        for name, (rights, cots, lengths) in seen.items():
            right = np.concatenate(rights)  # [problems, G]
            by_problem = right.mean(axis=1)
            texts = [some[i : i + G] for some in cots for i in range(0, len(some), G)]
            rows.append({
                "mode": name, "success": float(right.mean()), "problems": len(right), "samples": G,
                "error": float(np.std(by_problem) / max(1, len(right) - 1) ** 0.5),
                "mixed": float(np.mean((by_problem > 0) & (by_problem < 1))),
                "different": float(np.mean([len(set(group)) / G for group in texts])),
                "cot_len": float(np.mean(lengths)),
            })  # fmt: skip
        return rows

    def signal(self, settings: dict[str, Setting], size: int) -> list[dict]:
        """n0 of every setting, in as many batches as there is time for."""
        sketch = Sketch(self.policy, size)
        kept = {name: {"cot": [], "answer": []} for name in settings}
        success, step, begun = {name: [] for name in settings}, 0, self.passed()
        while step < 3 or self.passed() + (self.passed() - begun) / step < 1:
            for name, setting in settings.items():
                r, rewards = self.sample(setting, step)
                advantages = softcot.rloo_advantages(torch.tensor(rewards)).flatten()
                device = r.prompt_ids.device
                found = gradients(self.policy, r, advantages.float().to(device), sketch)
                for part, gradient in found.items():
                    if not isinstance(gradient, Tensor):  # no group was mixed
                        gradient = torch.zeros(sketch.M)
                    kept[name][part].append(gradient)
                success[name].append((rewards == 100).mean())
            step += 1
        N = self.config.prompts * self.config.samples
        rows = []
        for name, parts in kept.items():
            for part, found in parts.items():
                stats = n0(torch.stack(found), N)
                rows.append({"mode": name, "of": part, "success": float(np.mean(success[name])), **stats})
        return rows


def number(x: float) -> str:
    """Two digits of it."""
    return f"{float(f'{x:.2g}'):,.0f}" if np.isfinite(x) else "inf"


def recommended(rows: list[dict]) -> float:
    """The factor above 0 with the most mixed groups; of equal ones the smallest."""
    soft = [row for row in rows if row["mode"].startswith("soft") and row["mode"] != "soft 0"]
    return float(max(soft, key=lambda row: row["mixed"])["mode"].split()[1])


def main(arguments=None) -> None:
    """Both tables, and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--modes", nargs="+", default=["hard", "soft", "fuzzy"], help="whose n0")
    parser.add_argument("--sketch", type=int, default=SKETCH, help="numbers kept of a gradient")
    parser.add_argument("--out", type=Path, help="append the figures to this .jsonl file")
    given, flags = parser.parse_known_args(arguments)
    config = softcot.filled(softcot.parse(flags))
    torch.set_num_threads(config.threads)
    lab = Lab(config, given.minutes)
    base = lab.success_by_noise()
    print("| CoT | success | groups mixed | different CoTs of a group | CoT length |")
    print("|---|---|---|---|---|")
    for row in base:
        print("| {mode} | {success:.3f} ± {error:.3f} | {mixed:.2f} | {different:.2f} |"
              " {cot_len:.0f} |".format(**row))  # fmt: skip
    factor = recommended(base)
    print(f"\nrecommended: --sigma-scale {factor:g} (the most groups with mixed outcomes)\n", flush=True)
    settings = {"hard": softcot.SETTINGS["hard_sample"]}
    for noise in dict.fromkeys([softcot.SETTINGS["soft_sample"].noise, factor]):
        soft = dataclasses.replace(softcot.settings_of(config)["soft_sample"], noise=noise)
        settings |= {f"soft {noise:g}": soft} if noise else {}
    for tau in (1e-4, 0.1):
        fuzzy = dataclasses.replace(softcot.SETTINGS["fuzzy_sample"], tau=tau)
        settings[f"fuzzy tau {tau:g}"] = fuzzy
    settings = {name: x for name, x in settings.items() if x.mode in given.modes}
    rows = lab.signal(settings, given.sketch)
    print("| mode | success | n0 of the CoT's score | n0 of the answers' score | batches |"
          " norms of the two gradients |\n|---|---|---|---|---|---|")  # fmt: skip
    for cot, answer in zip(rows[::2], rows[1::2]):
        texts = [f"{number(x['n0'])} [{number(x['low'])}, {number(x['high'])}]" for x in (cot, answer)]
        norms = ", ".join(number(x["norm"]) for x in (cot, answer))
        print(f"| {cot['mode']} | {cot['success']:.3f} | {' | '.join(texts)} |"
              f" {cot['K']} x {cot['N']} | {norms} |")  # fmt: skip
    if given.out:
        finite = [{k: None if v == math.inf else v for k, v in row.items()} for row in rows]
        record = {"model": config.model or "toy", "task": config.task, "seed": config.seed}
        record |= {"max_cot": config.max_cot, "tau": config.tau, "sketch": given.sketch}
        record |= {"base": base, "recommended": factor, "n0": finite}
        softcot.append_jsonl(given.out, record)


if __name__ == "__main__":
    main()
