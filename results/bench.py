"""Seconds of a rollout and of a training step in each mode, beside generate() of transformers.

    python results/bench.py --model MODEL --task gsm8k --prompts 1 --samples 8 --max-cot 48 --max-answer 8

takes the flags of softcot.py. Medians of three steps after a first one, on real prompts. No row ends
before --max-cot and --max-answer, so all modes and generate() make equally many tokens; answers are
judged right and wrong in turn, so that groups are mixed; and the learning rate is so small that
all modes meet the same weights. The last line is the highest memory of the GPU or, without one, of
the process (not on Windows).
"""

import dataclasses
import itertools
import sys
import timeit
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import softcot
import toy_tasks
from softcot import SETTINGS, Config, Policy

COLUMNS = "tokens_per_s rollout_s train_s mixed_groups".split()


@contextmanager
def replaced(name: str, function):
    """Within, a function of softcot is another one."""
    real = getattr(softcot, name)
    setattr(softcot, name, function)
    yield
    setattr(softcot, name, real)


@contextmanager
def nothing_ends(policy: Policy):
    """Within, no text is done and no token ends one."""
    real, ends = softcot.generate, policy.end_ids
    policy.end_ids = set()

    def endless(engine, setting, limit, _, **how):
        """generate() with a text that is never done."""
        return real(engine, setting, limit, lambda text: False, **how)

    with replaced("generate", endless):
        yield
    policy.end_ids = ends


def bench_modes(policy: Policy, config: Config, problems: list[softcot.Problem]) -> None:
    """A row for hard, soft and fuzzy training."""
    coin = itertools.cycle([100.0, 0.0])
    still = dataclasses.replace(config, lr=1e-30)
    optimizer = softcot.make_optimizer(policy, still)
    print(" " * 10, *(f"{name:>12}" for name in COLUMNS), flush=True)
    for cot in ("hard", "soft", "fuzzy"):
        mode = SETTINGS[f"{cot}_sample"]
        new = dict(cot=cot, tau=mode.tau, sigma_scale=mode.noise or None)
        how = (dataclasses.replace(still, **new), optimizer)
        with nothing_ends(policy), replaced("reward", lambda *_: next(coin)):
            seen = [softcot.train_step(policy, problems, step, *how)[0] for step in range(4)]
        medians = [np.median([metrics[name] for metrics in seen[1:]]) for name in COLUMNS]
        print(f"{cot:10}", *(f"{x:12.2f}" for x in medians), flush=True)


def bench_generate(policy: Policy, config: Config, problems: list[softcot.Problem]) -> None:
    """The row of generate()."""
    new = config.max_cot + config.max_answer
    policy.tokenizer.padding_side = "left"
    prompts = [problem.prompt for problem in problems for _ in range(config.samples)]
    batch = policy.tokenizer(prompts, padding=True, return_tensors="pt").to(policy.model.device)
    how = dict(do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new)
    with torch.no_grad(), policy.arithmetic():
        call = lambda: policy.model.generate(**batch, **how)
        seconds = np.median(timeit.repeat(call, number=1, repeat=4)[1:])
    print(f"generate() {len(prompts) * new / seconds:12.2f} {seconds:12.2f}")


def highest_gib(device: str) -> float:
    """The most memory that the GPU, or on a CPU this process, has had so far, in GiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not there on Windows
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(arguments: list[str]) -> None:
    """Load what the flags say, and print the table."""
    config = softcot.filled(softcot.parse(arguments))
    torch.set_num_threads(config.threads)
    base = config.model or str(toy_tasks.base_model(Path("runs/toy-base")))
    policy = softcot.load_policy(config, base)
    problems = softcot.load_problems(config, config.task, "train")[: config.prompts]
    bench_modes(policy, config, problems)
    bench_generate(policy, config, problems)
    print(f"highest memory: {highest_gib(config.device):.1f} GiB")


if __name__ == "__main__":
    main(sys.argv[1:])
