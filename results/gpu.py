"""Is it right and fast on this GPU? One command, no network, about five minutes on an H100.

    python results/gpu.py                # all of it; random weights in the shapes of real models
    python results/gpu.py --tiny         # the same on a CPU with tiny shapes: does the script work?

Prints Markdown: what was measured, the figure, and the target where there is one. A part that fails
is named (the traceback goes to stderr) and the others go on. transformers older than 5.23 repeats keys and values for each group
of heads at every token, which makes the engine slower.
"""

import argparse
import gc
import math
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import softcot
import toy_tasks
from softcot import SETTINGS, Config, Policy

QWEN = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)  # fmt: skip
LLAMA = dict(vocab_size=128256, num_key_value_heads=8, head_dim=128)
LLAMA_3B = LLAMA | dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                        num_attention_heads=24, tie_word_embeddings=True)  # fmt: skip
LLAMA_8B = LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                        num_attention_heads=32, tie_word_embeddings=False)  # fmt: skip
SHAPES = {
    "Qwen2.5-0.5B": (transformers.Qwen2Config, QWEN),
    "Llama-3.2-3B": (transformers.LlamaConfig, LLAMA_3B),
    "Llama-3.1-8B": (transformers.LlamaConfig, LLAMA_8B),
}
TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=256, head_dim=16)  # fmt: skip
H100_BYTES = 85_000_000_000  # of which CUDA itself takes some
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12, "4090": 1.0e12}  # bytes a second


class Lab:
    """The machine, and models made for it."""

    def __init__(self, tiny: bool):
        self.tiny, self.device = tiny, "cpu" if tiny else "cuda"
        self.started = time.perf_counter()
        self.B, self.G, self.cot, self.answer, self.prompt = (2, 2, 6, 3, 9) if tiny else (2, 32, 128, 32, 120)

    def policy(self, shape: str, dtype: str, layers=None, sharp=None) -> Policy:
        """A policy with random weights.

        sharp: a head of its own, its weights times this. 6 makes logits of a real model's spread, a
        few likely tokens. (A head that is the embeddings would repeat the last token for ever.)"""
        kind, sizes = SHAPES[shape]
        sizes = sizes | (TINY if self.tiny else {}) | ({} if layers is None else {"num_hidden_layers": layers})
        sizes |= {"tie_word_embeddings": False} if sharp else {}
        torch.manual_seed(0)
        tokenizer = toy_tasks.make_tokenizer()
        ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=None, bos_token_id=None)
        with torch.device(self.device):
            weights = torch.bfloat16 if dtype == "bf16" else torch.float32
            config = kind(**sizes, **ids)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=weights).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight[:] *= sharp or 1
        if not self.tiny:  # as load_policy() does
            torch.set_float32_matmul_precision("high")
            torch.backends.cuda.enable_cudnn_sdp(False)
        return Policy(model, tokenizer, mixed=dtype == "bf16-mixed")

    def config(self, dtype: str) -> Config:
        """The settings of a step of soft training."""
        return Config(cot="soft", tau=0.5, sigma_scale=0.33, max_cot=self.cot, max_answer=self.answer,
                      lr=1e-6, steps=10, dtype=dtype)  # fmt: skip

    def rollout(self, policy, setting, rows=None, cot=None, answer=None, seed=0, prompt=None):
        """Rows of B different prompts, as in a training step."""
        rows = rows or self.B * self.G
        each = -(-rows // self.B)
        texts = ["3" + "+5" * (prompt or self.prompt) + "+2" * b + "=" for b in range(self.B)]
        prompts = [text for text in texts for _ in range(each)][:rows]
        seeds = softcot.row_seeds([(seed, n) for n in range(rows)])
        how = (SETTINGS[setting], cot or self.cot, self.answer if answer is None else answer, 1.0)
        return softcot.rollout(policy, prompts, seeds, *how)

    def seconds(self, function, times=3) -> float:
        """Median time of a function, after a first call."""
        found = []
        for _ in range(2 if self.tiny else times + 1):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            found.append(time.perf_counter() - start)
        return float(np.median(found[1:]))

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if not self.tiny:
            torch.cuda.synchronize()

    def ballast(self) -> torch.Tensor:
        """What a larger card must leave alone to have the memory of an H100 of 80 GB."""
        total = 0 if self.tiny else torch.cuda.get_device_properties(0).total_memory
        return torch.empty(max(0, total - H100_BYTES), dtype=torch.int8, device=self.device)

    def peak(self) -> float:
        """Highest memory of the GPU in GiB since the last call."""
        if self.tiny:
            return float("nan")
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak


def row(what: str, figure: str, target: str = "") -> None:
    """A row of the table."""
    print(f"| {what} | {figure} | {target} |", flush=True)


def mixed_advantages(r) -> torch.Tensor:
    """+1 and -1 in turn: no row is left out of the backward pass."""
    return torch.tensor([1.0, -1.0] * len(r.cots))[: len(r.cots)].to(r.cot.ids.device)


def nan_sweep(lab: Lab) -> None:
    """Is the gradient finite at every length modulo 128, with prompts of unequal length?"""
    policy = lab.policy("Qwen2.5-0.5B", "bf16-mixed", layers=2, sharp=6.0)
    bad, lengths = [], range(1, 10) if lab.tiny else range(1, 130)
    for length in lengths:
        r = lab.rollout(policy, "soft_sample", rows=4, cot=4, answer=4, prompt=length)
        policy.model.zero_grad()
        softcot.policy_gradient(policy, r, mixed_advantages(r))
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        bad += [] if math.isfinite(norm) else [length]
    row(f"gradients that are not finite, prompts of {len(lengths)} lengths", f"{len(bad)} {bad[:5]}", "0")


def plain_loop(policy: Policy, r, n: int, setting, seed) -> torch.Tensor:
    """Row n of a rollout again, without cache, batch, padding or graph: ids of the CoT [T]."""
    embed, E = policy.model.get_input_embeddings(), policy.embeddings()
    x, ids = embed(r.prompt_ids[n][r.prompt_mask[n]])[None], []
    for t in range(int(r.cot.mask[n].sum())):
        hidden = policy.model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1]
        u, eps = softcot.draw(seed, torch.tensor([t], device=seed.device), E.shape[1])
        noise = eps if r.sigma else None
        new = softcot.next_input(policy.head(hidden), setting, E, r.sigma, noise, u)
        x = torch.cat([x, new.x[:, None]], dim=1)
        ids.append(new.ids)
    return torch.cat(ids)


@torch.no_grad()
def same_as_plain(lab: Lab) -> None:
    """Does the replayed engine give the tokens of the plain loop, also the second and third time?"""
    policy, agreed = lab.policy("Qwen2.5-0.5B", "fp32", layers=2, sharp=6.0), {}
    if not lab.tiny:
        torch.set_float32_matmul_precision("highest")  # TF32 would round both in different ways
    for seed, name in enumerate(("hard_sample", "soft_sample", "fuzzy_sample", "hard_sample", "soft_sample")):
        r = lab.rollout(policy, name, rows=8, cot=40, answer=4, seed=seed, prompt=10 + 7 * seed)
        for n in range(0, 8, 3):
            one = softcot.row_seeds([(seed, n)]).to(r.cot.ids.device)
            ids = plain_loop(policy, r, n, SETTINGS[name], one)
            same = (ids == r.cot.ids[n, : len(ids)]).long().cumprod(0)
            found = agreed.setdefault(name.split("_")[0], [0, 0])
            found[:] = found[0] + same.sum().item(), found[1] + len(ids)
        with torch.no_grad():  # as an optimiser does: in place
            policy.model.get_input_embeddings().weight[:] *= 1.01
    figure = ", ".join(f"{mode} {same} of {whole}" for mode, (same, whole) in agreed.items())
    row("CoT tokens of the engine that are those of a plain loop (fp32; 5 rollouts, changing weights)",
        figure, "all, but for soft ones behind a near-tie")  # fmt: skip


def gradients(lab: Lab) -> None:
    """How far means move between rollout and loss, and how good the bf16 gradient is."""
    for name in ("soft_sample", "fuzzy_sample", "hard_sample"):
        exact = {}
        for dtype in ("fp32", "bf16-mixed"):
            policy = lab.policy("Qwen2.5-0.5B", dtype, sharp=6.0)
            r = lab.rollout(policy, name, rows=8, cot=min(64, lab.cot))
            if not exact:
                reference = r
            stats = softcot.policy_gradient(policy, r, mixed_advantages(r))
            del stats["loss"]
            policy.model.zero_grad()
            softcot.policy_gradient(policy, reference, mixed_advantages(reference))
            weights = [w.grad.flatten() for n, w in policy.model.named_parameters() if "layers" in n]
            gradient = torch.cat(weights)
            figure = " ".join(f"{key} {value:.3g}" for key, value in stats.items())
            if exact:
                cosine = torch.cosine_similarity(gradient, exact["fp32"], dim=0).item()
                figure += f"; cosine with fp32 {cosine:.4f}"
            exact[dtype] = gradient
            del policy
            gc.collect()
            row(f"{name}, {dtype}: rollout against loss", figure, "cosine 0.95" if len(exact) == 2 else "")


@torch.no_grad()
def decoding(lab: Lab, shape: str, dtype: str, target: str) -> None:
    """Tokens a second of the engine, of the same without replaying, and of generate()."""
    policy = lab.policy(shape, dtype)
    rows, new = lab.B * lab.G, lab.cot + lab.answer
    found = {}
    for name in ("hard_sample", "soft_sample"):
        found[name] = rows * new / lab.seconds(lambda: lab.rollout(policy, name))
    per_token = rows / found["soft_sample"]
    real, softcot.run_and_record = softcot.run_and_record, lambda step, *_: step()
    policy.engine = None
    short = max(2, lab.cot // 8)
    try:
        eager = rows * (short + 1) / lab.seconds(lambda: lab.rollout(policy, "soft_sample", cot=short, answer=1), 1)
    finally:  # other parts go on without this one
        softcot.run_and_record, policy.engine = real, None
    ids = torch.full((rows, lab.prompt), 5, device=lab.device)
    how = dict(do_sample=True, top_k=0, min_new_tokens=short, max_new_tokens=short, attention_mask=ids > 0)
    with policy.arithmetic():
        plain = rows * short / lab.seconds(lambda: policy.model.generate(ids, **how), 1)
    hard, soft = found.values()
    row(f"{shape} {dtype}, {rows} rows: tokens/s hard, soft, without replaying, generate()",
        f"{hard:,.0f}, {soft:,.0f}, {eager:,.0f}, {plain:,.0f}")  # fmt: skip
    row("soft / hard; hard / generate()", f"{soft / hard:.2f}; {hard / plain:.1f}", target)
    base = sum(w.numel() for n, w in policy.model.base_model.named_parameters() if "embed" not in n)
    E = policy.embeddings()
    config = policy.model.config
    width = config.num_key_value_heads * (getattr(config, "head_dim", None) or 64) * config.num_hidden_layers
    moved = 2 * base + 2 * E.nbytes + 2 * 2 * width * rows * (lab.prompt + new // 2)
    for card, speed in BANDWIDTH.items():
        if not lab.tiny and card in torch.cuda.get_device_name():
            row("share of the memory bandwidth (weights, head, mixture, keys)",
                f"{moved / per_token / speed:.2f} at {1000 * per_token:.2f} ms a token")  # fmt: skip


@torch.no_grad()
def where_time_goes(lab: Lab) -> None:
    """Milliseconds of the parts of a step that are outside the layers, called alone."""
    policy, E = (p := lab.policy("Qwen2.5-0.5B", "bf16-mixed")), p.embeddings()
    for rows in (4,) if lab.tiny else (64, 512):
        hidden = torch.randn(rows, E.shape[1], device=lab.device)
        logits, u = policy.head(hidden), torch.rand(rows, device=lab.device)
        parts = {
            "head": lambda: policy.head(hidden),
            "entropy": lambda: softcot.entropy(logits),
            "sample_token": lambda: softcot.sample_token(logits, 1.0, u),
            "categorical_logp": lambda: softcot.categorical_logp(u.long(), logits, 1.0),
            "mixture": lambda: softcot.mixture(logits, 0.5, E),
            "argmax": lambda: logits.argmax(-1),
        }
        times = {name: 1000 * lab.seconds(part, 10) for name, part in parts.items()}
        row(f"ms outside the layers, {rows} rows", ", ".join(f"{k} {v:.2f}" for k, v in times.items()))
    seeds = softcot.row_seeds([(0, n) for n in range(1024)]).to(lab.device)
    positions = torch.arange(12, device=lab.device)  # of CoT and answer
    seconds = lab.seconds(lambda: [softcot.draw(seeds, t, 64) for t in positions], 10)
    row("ms for the random numbers of 1,024 rows of the toy", f"{1000 * seconds:.2f}", "20")


def evaluation(lab: Lab) -> None:
    """Tokens a second of hard sampling in large batches."""
    policy = lab.policy("Qwen2.5-0.5B", "bf16-mixed")
    rows, cot = (8, 8) if lab.tiny else (512, 256)
    s = lab.seconds(lambda: lab.rollout(policy, "hard_sample", rows=rows, cot=cot, answer=1), 2)
    row(f"evaluation, 0.5B, {rows} rows, CoT {cot}: tokens/s", f"{rows * cot / s:,.0f}", "80,000")


def whole_step(lab: Lab, shape: str, dtype: str, target: str) -> None:
    """Seconds and memory of a step, with no more memory than an H100 has: rollout, gradient, update."""
    policy, config = lab.policy(shape, dtype), lab.config(dtype)
    optimizer, ballast = softcot.make_optimizer(policy, config), lab.ballast()
    lab.peak()
    times = {"rollout": [], "gradient": [], "update": []}
    for step in range(3):
        marks = [time.perf_counter()]
        r = lab.rollout(policy, "soft_sample", seed=step)
        lab.wait()
        marks.append(time.perf_counter())
        tokens = softcot.affordable_tokens(policy)
        softcot.policy_gradient(policy, r, mixed_advantages(r), tokens)
        lab.wait()
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), softcot.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        lab.wait()
        marks.append(time.perf_counter())
        for name, s in zip(times, np.diff(marks)):
            times[name].append(s)
    last = {name: found[-1] for name, found in times.items()}
    figure = ", ".join(f"{name} {s:.2f}" for name, s in last.items())
    row(f"{shape} {dtype}: a soft step of {lab.B} x {lab.G} rows, {lab.cot} + {lab.answer} tokens, s",
        f"{sum(last.values()):.2f} ({figure}), {lab.peak() - ballast.nbytes / 2**30:.1f} GiB,"
        f" micro-batch {tokens:,}", target)  # fmt: skip


def main(arguments=None) -> None:
    """All parts, the cheap ones first; what would begin too late is left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--minutes", type=float, default=5.0, help="begin no part after so many")
    given = parser.parse_args(arguments)
    lab = Lab(given.tiny)
    name = "CPU, tiny shapes" if lab.tiny else torch.cuda.get_device_name()
    print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| what | measured | target |\n|---|---|---|")
    parts = {
        "NaN sweep": lambda: nan_sweep(lab),
        "engine = plain loop": lambda: same_as_plain(lab),
        "random numbers, parts of a step": lambda: where_time_goes(lab),
        "decoding 0.5B": lambda: decoding(lab, "Qwen2.5-0.5B", "bf16-mixed", "0.95; 4"),
        "step 0.5B": lambda: whole_step(lab, "Qwen2.5-0.5B", "bf16-mixed", "gradient 1.2"),
        "step 3B": lambda: whole_step(lab, "Llama-3.2-3B", "bf16-mixed", "3.5"),
        "evaluation": lambda: evaluation(lab),
        "gradients": lambda: gradients(lab),
        "decoding 3B": lambda: decoding(lab, "Llama-3.2-3B", "bf16-mixed", "0.95; 3"),
        "step 8B": lambda: whole_step(lab, "Llama-3.1-8B", "bf16", "15; 80 GB"),
        "decoding 8B": lambda: decoding(lab, "Llama-3.1-8B", "bf16", "0.95"),
    }
    for what, part in parts.items():
        if time.perf_counter() - lab.started > 60 * given.minutes:
            row(what, "not measured: out of time")
            continue
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            row(what, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        gc.collect()  # a policy, its engine and its graphs know each other
        if not lab.tiny:
            torch.cuda.empty_cache()
    row("seconds in all", f"{time.perf_counter() - lab.started:.0f}", "300")


if __name__ == "__main__":
    main()
