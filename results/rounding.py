"""What rounding does to the gradient of soft tokens, measured from the noise and from the distance.

    python results/rounding.py MODEL DATA_DIR    # a table for a real model; minutes on a CPU
    python results/rounding.py toy               # the toy, trained both ways with rounded rollouts

Equation 10 can be read in two ways. "recomputed": the sample x is as it was fed, and its distance
to the mean is measured where the loss finds the mean. "from noise", as softcot.py does: the sample
is where its noise takes it from there. In exact arithmetic they are the same.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import softcot
import toy_tasks

BITS = {"fp32": 24, "TF32": 11, "bf16": 8}  # of the mantissa, the leading 1 among them


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x to the nearest number with so many bits of mantissa; its gradient is that of x."""
    drop = 24 - bits  # of an fp32's 24; half of the last kept one is added, and the rest cut off
    whole = x.detach().contiguous().view(torch.int32)
    whole = whole + (1 << drop - 1) - 1 + (whole >> drop & 1)  # ties go to the even one
    return x + ((whole & -(1 << drop)).view(torch.float32) - x).detach()


@contextmanager
def arithmetic(policy: softcot.Policy, name: str):
    """Linear layers round inputs and weights to a format; bf16 also what they give."""
    bits = BITS[name]
    layers = [m for m in policy.model.base_model.modules() if isinstance(m, nn.Linear)]
    before = [module.__dict__.get("forward") for module in layers]
    for module in layers if bits < 24 else []:
        weight = rounded(module.weight.detach(), bits)

        def forward(x, module=module, weight=weight):
            """The layer's output, rounded."""
            w = weight  # with the gradient of the weight as it is
            if torch.is_grad_enabled():
                w = module.weight + (weight - module.weight).detach()
            y = nn.functional.linear(rounded(x, bits), w, module.bias)
            return rounded(y, bits) if name == "bf16" else y

        module.forward = forward
    policy.engine = None
    yield
    for module, forward in zip(layers, before):
        module.__dict__.pop("forward", None)
        if forward is not None:
            module.forward = forward
    policy.engine = None


def recomputed(policy, setting, sigma, hidden, ids, eps=None, x=None):
    """softcot.positions_logp() with the distance of x as it was fed from the mean found here."""
    logits = policy.head(hidden)
    if setting.mode == "hard":
        return softcot.categorical_logp(ids, logits, setting.tau), torch.zeros(len(ids))
    mean = softcot.mixture(logits, setting.tau, policy.embeddings())
    moved = (x - sigma * eps - mean.detach()).norm(dim=-1) / sigma
    return softcot.gaussian_logp(x, mean, sigma), moved


@contextmanager
def score(name: str):
    """Log-probabilities "from noise", as they are, or "recomputed"."""
    before = softcot.positions_logp
    softcot.positions_logp = recomputed if name == "recomputed" else before
    yield
    softcot.positions_logp = before


def cot_gradient(policy: softcot.Policy, r: softcot.Rollout) -> tuple[torch.Tensor, ...]:
    """Of the CoT's log-probabilities with advantages +1, -1, ...: the gradient of every fourth layer's
    weights; how far means moved [M], in sigma; largest distance to the rollout's log-probability."""
    policy.model.zero_grad()
    moves, gap = [], 0.0
    for n in range(len(r.cots)):
        part = softcot.rows_of(r, torch.tensor([n]))
        cot, _, moved = softcot.log_probs(policy, part)
        (cot.sum() * (-1) ** n).backward()
        moves.append(moved[part.cot.mask])
        gap = max(gap, (cot.detach() - part.cot.logp).abs().max().item())
    stack = next(m for m in policy.model.modules() if isinstance(m, nn.ModuleList))
    weights = [w for layer in stack[::4] for w in layer.parameters()]
    gradient = torch.cat([w.grad.flatten() for w in weights]).double()  # a hundred million terms
    policy.model.zero_grad()
    return gradient, torch.cat(moves), gap


def table(folder: str, data_dir: str, tokens: int, samples: int) -> None:
    """Print a row for each pair of formats of rollout and loss, and each mode."""
    config = softcot.Config(model=folder, task="gsm8k", data_dir=data_dir, device="cpu")
    config = softcot.filled(dataclasses.replace(config, max_cot=tokens))
    policy = softcot.load_policy(config, folder)
    problems = softcot.load_problems(config, "gsm8k", "train")[:2]
    prompts = [problem.prompt for problem in problems for _ in range(samples)]
    seeds = softcot.row_seeds([(0, n) for n in range(len(prompts))])
    print("| mode | rollout, loss | mean moved, in sigma: median, 99 %, largest | largest gap of log pi,"
          " recomputed | norm: recomputed, from noise | cosine with exact: recomputed, from noise |")
    print("|---|---|---|---|---|---|")
    pairs = [("fp32", "fp32"), ("TF32", "TF32"), ("bf16", "bf16"), ("bf16", "fp32")]
    for mode, some in {"soft": pairs, "fuzzy": pairs[2:], "hard": pairs[2:3]}.items():
        for sampled, trained in some:
            with arithmetic(policy, sampled):
                setting = softcot.SETTINGS[f"{mode}_sample"]
                r = softcot.rollout(policy, prompts, seeds, setting, tokens, 1, 1.0)
            found = {}
            with arithmetic(policy, trained):
                for name in ("recomputed", "from noise"):
                    with score(name):
                        found[name] = cot_gradient(policy, r)
            exact = found["from noise"][0]
            if trained != "fp32":
                with arithmetic(policy, "fp32"):
                    exact, _, _ = cot_gradient(policy, r)
            moved = np.quantile(found["from noise"][1], [0.5, 0.99, 1])
            norms = [found[name][0].norm() for name in found]
            cosines = [found[name][0] @ exact / norm / exact.norm() for name, norm in zip(found, norms)]
            if exact.norm() == 0:
                cosines = [math.nan, math.nan]  # one-hot mixtures: the score reaches no layer
            gap = found["recomputed"][2]
            print(f"| {mode} | {sampled}, {trained} | {moved[0]:.4f}, {moved[1]:.3f}, {moved[2]:.2f} |"
                  f" {gap:.3g} | {norms[0]:,.3g}, {norms[1]:,.3g} | {cosines[0]:.4f}, {cosines[1]:.4f} |",
                  flush=True)


def train_toy(steps: int) -> None:
    """Train the toy with rollouts in bf16 and the loss in fp32, with either score; a row each."""
    base = str(toy_tasks.base_model(Path("runs/toy-base")))
    print("| rollouts | score | success, last ten steps | hard greedy | largest distance of a mean, sigma |")
    print("|---|---|---|---|---|")
    real = softcot.rollout

    def in_bf16(policy, *arguments):
        """The same rollout in bf16."""
        with arithmetic(policy, "bf16"):
            return real(policy, *arguments)

    for sampled in ("fp32", "bf16"):
        for name in ("recomputed", "from noise"):
            softcot.rollout = in_bf16 if sampled == "bf16" else real
            with tempfile.TemporaryDirectory() as out, score(name):
                flags = f"--steps {steps} --eval-limit 0 --out-dir {out} --model {base} --device cpu"
                softcot.run(softcot.parse(flags.split()))
                rows = softcot.read_log(Path(out) / "metrics.jsonl")
                softcot.rollout = real
                config = softcot.filled(softcot.parse(flags.split()))
                policy = softcot.load_policy(config, f"{out}/model")
                test = softcot.load_problems(config, "toy", "test")[:128]
                scores = softcot.evaluate(policy, test, softcot.SETTINGS["hard_greedy"], config, 1)
            success = np.mean([row["success"] for row in rows[-10:]])
            moved = max(row["mean_moved_max"] for row in rows)
            print(f"| {sampled} | {name} | {success:.3f} | {scores['k']['1']:.3f} | {moved:.3g} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data_dir", nargs="?")
    parser.add_argument("--tokens", type=int, default=64, help="of each CoT")
    parser.add_argument("--samples", type=int, default=4, help="of each of two prompts")
    parser.add_argument("--steps", type=int, default=100, help="of the toy's training")
    given = parser.parse_args()
    if given.model == "toy":
        train_toy(given.steps)
    else:
        table(given.model, given.data_dir, given.tokens, given.samples)
