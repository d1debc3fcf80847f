"""Tests of softcot: every one compares with an oracle (numpy, float64, brute force, a plain loop).

    python -m pytest                 # .ci/run: two halves of about 5 minutes; no network
"""

import ast
import asyncio
import collections
import contextlib
import dataclasses
import fractions
import gc
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries that read it
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread mostly waits, and actively

import ipykernel_launcher
import matplotlib.figure
import nbformat
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jupyter_client.provisioning import local_provisioner
from nbclient import NotebookClient
from PIL import Image, ImageSequence
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutput

import softcot
import toy_tasks
from notebooks import checks
from results import answers, bench, choices, gpu, real_model, real_sums, rounding, show, snr
from results import walk, window
from softcot import SETTINGS, Policy, Problem, Setting

HERE = Path(__file__).parent
gc.collect()
gc.freeze()  # what has been imported is not looked through again, in 0.3 s for each run


# ------------------------------------------------------------------------------------------------
# Small models and tokenizers made on the spot
# ------------------------------------------------------------------------------------------------


def char_tokenizer(extra=()):
    """One token a character (so that a stop phrase is many tokens), and the extra ones as written."""
    chars = [chr(c) for c in range(32, 127)] + ["\n"]
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>"] + chars)}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens(list(extra))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_policy(kind: str) -> Policy:
    """A random model of a few thousand weights: rotary, absolute, tied, scaled or untied."""
    torch.manual_seed(0)
    tokenizer = char_tokenizer()
    size = dict(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, bos_token_id=None)
    block = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    block |= dict(num_key_value_heads=1, initializer_range=0.2)
    config = {
        "llama": lambda: transformers.LlamaConfig(**size, **block),
        "llama-tied": lambda: transformers.LlamaConfig(**size, **block, tie_word_embeddings=True),
        "qwen2": lambda: transformers.Qwen2Config(**size, **block, tie_word_embeddings=True),
        "gemma": lambda: transformers.GemmaConfig(**size, **block, head_dim=16),
        "gemma2": lambda: transformers.Gemma2Config(
            **size, **block, head_dim=16, final_logit_softcapping=0.5, sliding_window=256
        ),
        "gpt2": lambda: transformers.GPT2Config(
            **size, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.2
        ),
    }[kind]()
    return Policy(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer)


KINDS = ("llama", "llama-tied", "qwen2", "gemma", "gpt2")
PROMPTS = ["What is 1+2?", "Hi", "A rather longer question, which needs no padding"]


def seeds_for(N):
    return softcot.row_seeds([(5, n) for n in range(N)])


def sample(policy, setting, prompts=PROMPTS, seeds=None, max_cot=12, max_answer=5, answer_tau=1.0, module=softcot):
    seeds = seeds_for(2 * len(prompts)) if seeds is None else seeds
    prompts = [text for text in prompts for _ in range(len(seeds) // len(prompts))]
    return module.rollout(policy, prompts, seeds, setting, max_cot, max_answer, answer_tau)


class Scripted(nn.Module):
    """A "model" that says what it is told: after prompt i (one token) it writes scripts[i]."""

    def __init__(self, tokenizer, prompts, scripts):
        super().__init__()
        self.config = transformers.LlamaConfig(num_hidden_layers=1)
        self.generation_config = transformers.GenerationConfig(eos_token_id=1)
        self.embed = nn.Embedding(len(tokenizer), 4)
        self.scripts, self.sizes, self.fed = scripts, [], []
        self.starts = self.embed(torch.tensor(tokenizer(prompts).input_ids))  # [prompts, 1, 4]
        self.device = torch.device("cpu")
        self.base_model = self.write

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return nn.Identity()  # write() makes logits right away

    def write(self, attention_mask, past_key_values, inputs_embeds, **_):
        x = inputs_embeds
        self.sizes.append(len(x))
        self.fed.append(x)
        keys, _ = past_key_values.update(x[:, None], x[:, None], 0)
        logits = torch.full((len(x), x.shape[1], self.embed.num_embeddings), -20.0)
        for n, counts in enumerate((attention_mask[:, 0] == 0).sum(-1).tolist()):
            prompt = (self.starts[:, 0] == keys[n, 0, 0]).all(1).int().argmax()
            script = self.scripts[prompt]
            for c, count in enumerate(counts):
                logits[n, c, script[min(count - 1, len(script) - 1)]] = 20.0
        return BaseModelOutput(last_hidden_state=logits)


# ------------------------------------------------------------------------------------------------
# Programs in forks of this process: torch and transformers, 6 s, have been imported there
# ------------------------------------------------------------------------------------------------


class Fork(multiprocessing.get_context("fork").Process):
    """A Python program that is running, in a fork; command is its file and its arguments."""

    def __init__(self, command, cwd=".", before=lambda: None, **environment):
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # of stdout and stderr
        super().__init__(target=as_main, args=(command, cwd, before, environment, self.files), daemon=True)
        self.start()

    def said(self):
        """What it has written so far: stdout and stderr."""
        return [os.pread(file.fileno(), 2**24, 0).decode(errors="replace") for file in self.files]

    def end(self):
        """Wait for it; exit status and output, as subprocess.run() gives them."""
        self.join()
        return subprocess.CompletedProcess(self.name, self.exitcode, *self.said())


def as_main(command, cwd, before, environment, files):
    """What a fork does: all that Python does when it is started with a file, but for its end."""
    signal.alarm(300)  # seconds: none waits for ever
    gc.freeze()  # what is there already need not be looked through, and so not copied
    tqdm.set_lock(threading.RLock())  # kill -9 could leave the one that its parent has locked
    os.chdir(cwd)
    os.environ.update(environment)
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", 1, os.environ.get("PYTHONIOENCODING"), closefd=False)
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)
    sys.argv = [str(word) for word in command]
    sys.path[:] = [str(Path(sys.argv[0]).parent), *(path for path in sys.path if path not in ("", str(HERE)))]
    for name in list(sys.modules):  # the project's own files are read again, from beside this one
        if name.split(".")[0] in ("softcot", "toy_tasks", "results", "notebooks"):
            del sys.modules[name]
    before()
    runpy.run_path(sys.argv[0], run_name="__main__")


def ended_together(processes, command):
    """Run a command in forks that find each other as torchrun's do; how each of them ended."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(some.getsockname()[1]), WORLD_SIZE=str(processes))
    forks = [Fork(command, **where, RANK=str(i), LOCAL_RANK=str(i)) for i in range(processes)]
    return [fork.end() for fork in forks]


# ------------------------------------------------------------------------------------------------
# Parts 1 and 2 of softcot.py: densities and mixtures
# ------------------------------------------------------------------------------------------------


def gaussian_oracle(logits, E, x, tau, sigma):
    """Equation 10 in float64 numpy."""
    z = logits / tau
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -((x - p @ E) ** 2).sum(-1) / (2 * sigma**2)


def finite_differences(f, x, h=1e-6):
    """Gradient of the scalar f at x by central differences, in float64."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        gradient[i] = (f(up) - f(down)) / (2 * h)
    return gradient


def test_gaussian_logp_and_its_gradients_equal_float64_and_finite_differences():
    rng = np.random.default_rng(0)
    logits, E, tau, sigma = rng.normal(size=(3, 7)), rng.normal(size=(7, 4)), 0.5, 0.3
    x = rng.normal(size=(3, 4))
    tl, tE, tx = (torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in (logits, E, x))
    ours = softcot.gaussian_logp(tx, softcot.mixture(tl, tau, tE), sigma)
    np.testing.assert_allclose(ours.detach(), gaussian_oracle(logits, E, x, tau, sigma), rtol=1e-5)
    ours.sum().backward()
    by_logits = finite_differences(lambda a: gaussian_oracle(a, E, x, tau, sigma).sum(), logits)
    by_E = finite_differences(lambda a: gaussian_oracle(logits, a, x, tau, sigma).sum(), E)
    np.testing.assert_allclose(tl.grad, by_logits, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(tE.grad, by_E, rtol=1e-3, atol=1e-4)
    assert tx.grad is None  # the sample is a constant


def test_categorical_logp_and_its_gradient_equal_float64_and_finite_differences():
    rng = np.random.default_rng(1)
    logits, tau, tokens = rng.normal(size=(4, 6)), 0.7, np.array([0, 5, 2, 2])

    def oracle(a):
        z = a / tau
        return z[np.arange(4), tokens] - np.log(np.exp(z).sum(1))

    t = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    ours = softcot.categorical_logp(torch.tensor(tokens), t, tau)
    np.testing.assert_allclose(ours.detach(), oracle(logits), rtol=1e-5)
    ours.sum().backward()
    expected = finite_differences(lambda a: oracle(a).sum(), logits)
    np.testing.assert_allclose(t.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mixture_of_a_certain_token_is_its_embedding_as_the_model_computes_it(kind):
    policy = tiny_policy(kind)
    V = len(policy.tokenizer)
    logits = torch.full((V, V), -1e4).fill_diagonal_(1e4)
    E = policy.embeddings()
    assert torch.equal(softcot.mixture(logits, 0.5, E), policy.model.get_input_embeddings()(torch.arange(V)))


def test_a_mixture_without_negligible_tokens_is_that_of_all_tokens():
    torch.manual_seed(0)
    logits, E = 20 * torch.randn(4, 5000), torch.randn(5000, 16)
    exact = torch.softmax(logits.double() / 0.5, -1) @ E.double()
    negligible = torch.softmax(logits / 0.5, -1).amax(0) < 2**-40
    assert negligible.sum() > 4900
    with torch.no_grad():
        torch.testing.assert_close(softcot.mixture(logits, 0.5, E), exact.float(), rtol=0, atol=2e-6)
        unread = softcot.mixture(logits, 0.5, E.masked_fill(negligible[:, None], math.nan))
        torch.testing.assert_close(unread, exact.float(), rtol=0, atol=2e-6)
        flat = softcot.mixture(torch.zeros(2, 5000), 0.5, E)  # nobody may be left out
    torch.testing.assert_close(flat, E.mean(0).expand(2, 16), rtol=0, atol=1e-6)


def test_embeddings_of_a_scaling_model_are_scaled_and_carry_gradient():
    policy = tiny_policy("gemma")
    weight = policy.model.get_input_embeddings().weight
    torch.testing.assert_close(policy.embeddings(), weight * 32**0.5)
    policy.embeddings().sum().backward()
    grad = weight.grad[1:]  # row 0 is the padding token: nn.Embedding gives it none
    torch.testing.assert_close(grad, torch.full_like(grad, 32**0.5))


def test_sampling_follows_the_distribution_and_never_picks_an_impossible_token():
    torch.manual_seed(0)
    logits = torch.randn(5).repeat(200_000, 1)
    logits[:, [0, 4]] = -math.inf
    tokens = softcot.sample_token(logits, 0.7, torch.rand(200_000))
    counts = torch.bincount(tokens, minlength=5) / 200_000
    p = torch.softmax(logits[0] / 0.7, -1)
    assert counts[0] == counts[4] == 0
    assert (counts - p).abs().max() < 4 * (p * (1 - p) / 200_000).sqrt().max()
    edges = softcot.sample_token(logits[:2], 0.7, torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [1, 3]


def test_noise_has_the_stated_size():
    policy = tiny_policy("llama")
    r = sample(policy, SETTINGS["soft_sample"], max_cot=40, seeds=seeds_for(60))
    assert r.sigma == pytest.approx(0.33 * policy.embeddings().square().mean().sqrt().item())
    D = policy.embeddings().shape[1]
    ratio = -2 * r.cot.logp[r.cot.mask] / D  # ||ht - h||^2 / (sigma^2 D), 1 on average
    assert ratio.mean().item() == pytest.approx(1, abs=4 * (2 / D / len(ratio)) ** 0.5)


# ------------------------------------------------------------------------------------------------
# Parts 3 to 5, with what part 11 has for them: model, engine, rollout
# ------------------------------------------------------------------------------------------------


def random_numbers(seeds, T, K):
    """Those of the first T positions: u [N, T], eps [N, T, K]."""
    drawn = [softcot.draw(seeds, torch.tensor([t]), K) for t in range(T)]
    return (torch.stack(x, dim=1) for x in zip(*drawn))


def plain_rollout(policy, prompt, seed, setting, max_cot, max_answer):
    """One sequence without cache, padding or batch, and its log-probabilities, in a plain loop."""
    model, E = policy.model, policy.embeddings().detach()
    sigma = setting.noise * E.square().mean().sqrt().item()
    u, eps = random_numbers(seed[None], max_cot + max_answer, E.shape[1])
    x = policy.model.get_input_embeddings()(policy.tokenizer(prompt, return_tensors="pt").input_ids)[0].detach()
    tokens, inputs, logps, text = [], [], [], ""
    for t in range(max_cot):
        logits = model(inputs_embeds=x[None]).logits[0, -1].detach()
        if setting.mode == "hard":
            if setting.tau == 0:
                token, logp = logits.argmax(), 0.0
            else:
                p = torch.softmax(logits / setting.tau, -1)
                token = (p.cumsum(0) > u[0, t]).int().argmax()
                logp = p[token].log().item()
            new = E[token]
        else:
            mean = torch.softmax(logits / setting.tau, -1) @ E[: len(logits)]
            new = mean + (sigma * eps[0, t] if sigma else 0)
            token = logits.argmax()
            logp = -((new - mean).square().sum() / (2 * sigma**2)).item() if sigma else 0.0
        tokens.append(token.item())
        inputs.append(new)
        logps.append(logp)
        x = torch.cat([x, new[None]])
        text += policy.tokenizer.decode([token.item()], skip_special_tokens=True)
        if token.item() in policy.end_ids or "The final answer is:" in text:
            break
    opening = " \\boxed{" if "The final answer is:" in text else "The final answer is: \\boxed{"
    prefill = policy.tokenizer(opening, return_tensors="pt", add_special_tokens=False).input_ids
    x = torch.cat([x, policy.model.get_input_embeddings()(prefill)[0].detach()])
    answer, answer_logps = [], []
    for a in range(max_answer):
        logp = torch.log_softmax(model(inputs_embeds=x[None]).logits[0, -1].detach(), -1)
        token = (logp.exp().cumsum(0) > u[0, max_cot + a]).int().argmax()
        answer.append(token.item())
        answer_logps.append(logp[token].item())
        x = torch.cat([x, E[token][None]])
        closed = softcot.boxed(policy.tokenizer.decode(answer)) is not None
        if token.item() in policy.end_ids or closed:
            break
    return tokens, torch.stack(inputs), logps, answer, answer_logps


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [{1}, set(range(0, 98, 9))], ids=["few-end", "many-end-early"])
def test_a_cached_batched_padded_rollout_equals_a_plain_one(kind, name, ends):
    policy, setting = tiny_policy(kind), SETTINGS[name]
    policy.end_ids = ends  # tokens after which a CoT ends: with many, rows leave the batch on the way
    seeds = seeds_for(6)
    r = sample(policy, setting, seeds=seeds)
    for n in range(6):
        tokens, inputs, logps, answer, answer_logps = plain_rollout(
            policy, PROMPTS[n // 2], seeds[n], setting, 12, 5
        )
        T, A = len(tokens), len(answer)
        assert r.cot.mask[n].tolist() == [t < T for t in range(r.cot.mask.shape[1])]
        assert r.answer.mask[n].tolist() == [a < A for a in range(r.answer.mask.shape[1])]
        assert r.cot.ids[n, :T].tolist() == tokens
        assert r.answer.ids[n, :A].tolist() == answer
        if setting.mode != "hard":  # a soft CoT feeds back on itself, so that rounding errors grow
            torch.testing.assert_close(r.cot.x[n, : min(T, 8)], inputs[:8], rtol=0, atol=2e-4)
            torch.testing.assert_close(r.cot.x[n, :T], inputs, rtol=0, atol=2e-2)
        np.testing.assert_allclose(r.cot.logp[n, :T], logps, rtol=1e-3, atol=2e-3)
        atol = 2e-3 if setting.mode == "hard" else 2e-2
        np.testing.assert_allclose(r.answer.logp[n, :A], answer_logps, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_hard_greedy_equals_generate_token_for_token(kind):
    policy = tiny_policy(kind)
    r = sample(policy, SETTINGS["hard_greedy"], seeds=seeds_for(3), max_cot=20)
    batch = policy.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    out = policy.model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=False,
        max_new_tokens=20,
        min_new_tokens=20,
        eos_token_id=None,
        pad_token_id=0,
    )
    new = out[:, batch.input_ids.shape[1] :]
    for n in range(3):
        T = r.cot.mask[n].sum()
        assert T == 20 or r.cot.ids[n, T - 1] == 1  # up to the limit or end of text
        assert r.cot.ids[n, :T].tolist() == new[n, :T].tolist()


@pytest.mark.parametrize("name", ["hard_sample", "soft_sample", "fuzzy_sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_log_probabilities_equal_those_of_the_rollout(kind, name):
    policy = tiny_policy(kind)
    r = sample(policy, SETTINGS[name])
    cot, answer, moved = softcot.log_probs(policy, r)
    # Through softmax(logits / 0.0001) rounding of the logits counts 10,000 times: look at residuals.
    atol = 0.5 if "fuzzy" in name else 2e-3
    torch.testing.assert_close(cot.detach(), r.cot.logp, rtol=1e-3, atol=atol)
    torch.testing.assert_close(answer.detach(), r.answer.logp, rtol=1e-3, atol=2e-3)
    assert cot.requires_grad and not r.cot.logp.requires_grad


AT = ("hidden", "logits", "topk-logits")  # where softcot.py adds no noise, but the paper's ablation


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """softcot.py with results/noise_elsewhere.diff, as a module of its own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(HERE / "softcot.py", folder)
    with open(HERE / "results" / "noise_elsewhere.diff") as diff:
        subprocess.run(["patch", "-p1"], cwd=folder, stdin=diff, check=True)
    spec = importlib.util.spec_from_file_location("elsewhere", folder / "softcot.py")
    sys.modules["elsewhere"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["elsewhere"])
    yield sys.modules["elsewhere"]
    del sys.modules["elsewhere"]


def with_noise_at(at, elsewhere, kind, cot="soft"):
    """The module that adds noise there, a small policy, and a setting with such noise."""
    policy, how = tiny_policy(kind), (cot, 0.5 if cot == "soft" else 0.1, 0.33)
    if at == "embedding":
        return softcot, policy, Setting(*how)
    return elsewhere, elsewhere.Policy(policy.model, policy.tokenizer), elsewhere.Setting(*how, noise_at=at)


@pytest.mark.parametrize("at", AT)
def test_noise_elsewhere_is_gaussian_there_and_its_log_probability_is_recomputed(at, elsewhere):
    _, policy, setting = with_noise_at(at, elsewhere, "llama")
    r = sample(policy, setting, seeds=seeds_for(30), max_cot=20, module=elsewhere)
    mask = r.cot.mask
    V = len(policy.tokenizer)
    assert r.cot.eps.shape == (*mask.shape, 32 if at == "hidden" else V)
    # the oracle: hidden states and logits of an unpadded pass over each row, in numpy's float64
    head = policy.model.lm_head.weight.detach().double().numpy()
    E = policy.embeddings().detach().double().numpy()
    ratios, scale = [], []
    for n in range(30):
        T = int(mask[n].sum())
        ids = r.prompt_ids[n][r.prompt_mask[n]]
        inputs = torch.cat([policy.model.get_input_embeddings()(ids), r.cot.x[n, :T]])
        out = policy.model.model(inputs_embeds=inputs[None]).last_hidden_state[0]
        hidden = out[len(ids) - 1 : -1].detach().double().numpy()  # [T, 32] before each thought
        logits, eps = hidden @ head.T, r.cot.eps[n, :T].double().numpy()
        noisy = (hidden + r.sigma * eps) @ head.T if at == "hidden" else logits + r.sigma * eps
        if at == "topk-logits":
            top = np.argsort(-logits, axis=1)[:, :5]
            assert (np.sort(top) == eps.nonzero()[1].reshape(T, 5)).all()  # the others have none
            ratios += list(np.take_along_axis(eps, top, 1).flatten())
        else:
            ratios += list(eps.flatten())
        p = np.exp(2 * (noisy - noisy.max(1, keepdims=True)))
        p /= p.sum(1, keepdims=True)
        np.testing.assert_allclose(r.cot.x[n, :T], p @ E, atol=1e-4)
        assert r.cot.ids[n, :T].tolist() == p.argmax(1).tolist()
        np.testing.assert_allclose(r.cot.logp[n, :T], -(eps**2).sum(1) / 2, rtol=1e-3, atol=1e-3)
        q = np.exp(logits - logits.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
        np.testing.assert_allclose(r.cot.entropy[n, :T], -(q * np.log(q)).sum(1), rtol=1e-3)
        scale.append({"hidden": hidden[0], "logits": logits[0]}.get(at, np.sort(-logits[0])[:5]))
    assert np.std(ratios) == pytest.approx(1, abs=4 / (2 * len(ratios)) ** 0.5)
    assert r.sigma == pytest.approx(0.33 * np.sqrt(np.square(scale).mean()), rel=1e-3)
    cot, _, moved = elsewhere.log_probs(policy, r)
    torch.testing.assert_close(cot.detach(), r.cot.logp, rtol=1e-3, atol=2e-3)
    assert moved[mask].isnan().all()  # no rollout keeps what it would take


def test_the_diff_of_the_noise_adds_a_flag_that_trains_and_git_applies_it(elsewhere, tiny_folder, tmp_path, capsys):
    shutil.copy(HERE / "softcot.py", tmp_path)
    apart = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}  # of no repository
    apply = ["git", "apply", HERE / "results" / "noise_elsewhere.diff"]
    subprocess.run(apply, cwd=tmp_path, env=apart, check=True)
    assert (tmp_path / "softcot.py").read_bytes() == Path(elsewhere.__file__).read_bytes()
    found = []
    for i, (module, at) in enumerate([(softcot, ""), (elsewhere, "embedding"), (elsewhere, "logits")]):
        flags = f"--steps 1 --prompts 2 --samples 8 --eval-limit 0 --model {tiny_folder}"
        flags += f" --out-dir {tmp_path / str(i)}" + f" --noise-at {at}" * bool(at)
        assert module.main(flags.split()) == 0
        found.append(read_lines(tmp_path / str(i) / "metrics.jsonl")[0])
    plain, same, other = found
    assert same["grad_norm"] == plain["grad_norm"] != other["grad_norm"] > 0
    assert math.isnan(other["mean_moved"])
    assert elsewhere.main(["--cot", "hard", "--noise-at", "logits"]) == 2
    assert "--noise-at has no use" in capsys.readouterr().err


PLACES = [("soft", "embedding"), ("fuzzy", "embedding"), *(("soft", at) for at in AT)]


def before_thoughts(policy, r):
    """Of each row of a rollout, the hidden states [T, H] that its CoT is made from, with gradient."""
    real = torch.cat([r.prompt_mask, r.cot.mask], dim=1)
    embed = policy.model.get_input_embeddings()
    x = torch.cat([embed(r.prompt_ids), r.cot.x], dim=1)
    P = r.prompt_ids.shape[1]
    hidden = policy.run(x, real, torch.arange(real.shape[1]))
    for n in range(len(x)):  # the last column of the prompt that is no gap, then the CoT's
        T = int(r.cot.mask[n].sum())
        yield hidden[n, [int(r.prompt_mask[n].sum()) - 1, *range(P, P + T - 1)]]


def recomputed_logp(policy, r):
    """Equation 10 read literally: minus the distance of the x that was fed from the mean now."""
    total = 0
    for n, hidden in enumerate(before_thoughts(policy, r)):
        mean = softcot.mixture(policy.head(hidden), r.setting.tau, policy.embeddings())
        total = total + (1 + n) * softcot.gaussian_logp(r.cot.x[n, : len(hidden)], mean, r.sigma).sum()
    return total


def recomputed_logp_elsewhere(policy, r):
    """The same of noise elsewhere than on the embedding, of those entries that have noise."""
    total = 0
    for n, hidden in enumerate(before_thoughts(policy, r)):
        mean = hidden if r.setting.noise_at == "hidden" else policy.head(hidden)
        eps = r.cot.eps[n, : len(hidden)]
        if r.setting.noise_at == "topk-logits":
            top = mean.topk(5).indices
            mean, eps = mean.gather(1, top), eps.gather(1, top)
        fed = (mean + r.sigma * eps).detach()
        total = total - (1 + n) * ((fed - mean) ** 2).sum() / (2 * r.sigma**2)
    return total


def grads_of(policy, value):
    policy.model.zero_grad()
    value.backward()
    return torch.cat([w.grad.flatten() for w in policy.model.parameters() if w.grad is not None])


def score_of_noise(policy, r, module=softcot):
    """What softcot makes of it: the same sum of log-probabilities, each row with its own weight."""
    cot, _, _ = module.log_probs(policy, r)
    return (cot.sum(1) * torch.arange(1, len(cot) + 1)).sum()


@pytest.mark.parametrize("cot, at", PLACES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_score_of_the_noise_is_that_of_equation_10_where_nothing_is_rounded(kind, cot, at, elsewhere):
    module, policy, setting = with_noise_at(at, elsewhere, kind, cot)
    policy.model.double()
    r = sample(policy, setting, module=module)
    oracle = recomputed_logp if module is softcot else recomputed_logp_elsewhere
    ours, oracle = score_of_noise(policy, r, module), oracle(policy, r)
    assert ours.item() == pytest.approx(oracle.item(), rel=1e-4)
    ours, oracle = grads_of(policy, ours), grads_of(policy, oracle)
    assert (ours - oracle).abs().max() < 1e-4 * oracle.abs().max()


def wide_policy():
    """Embeddings 512 wide, so two of them are 97 sigma apart, and sharp distributions with ties."""
    torch.manual_seed(1)
    tokenizer = char_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 10
    return Policy(model, tokenizer)


def rounded_rollout(policy, setting, seeds):
    """A rollout by a model whose arithmetic is bf16, which the loss's need not be."""
    policy.mixed, policy.engine = True, None
    r = sample(policy, setting, PROMPTS[:2], seeds, max_cot=24)
    policy.mixed, policy.engine = False, None
    return r


@pytest.mark.parametrize("cot, tau", [("soft", 0.5), ("fuzzy", 0.1)])
def test_rounding_ruins_the_recomputed_gradient_and_not_that_of_the_noise(cot, tau):
    """A rollout in bf16, a loss in fp32: the score is the noise that was drawn, or it is rounding."""
    policy = wide_policy()
    r = rounded_rollout(policy, Setting(cot, tau, 0.33), seeds_for(12))
    exact = grads_of(policy, score_of_noise(policy, r))
    assert softcot.log_probs(policy, r)[2].max() > 2  # sigma: there is a near-tie
    recomputed = grads_of(policy, recomputed_logp(policy, r))
    policy.mixed = True
    rounded = grads_of(policy, score_of_noise(policy, r))  # the loss in bf16, too
    assert torch.cosine_similarity(rounded, exact, dim=0) >= 0.97
    assert torch.cosine_similarity(recomputed, exact, dim=0) < 0.7


def test_no_row_of_an_attention_mask_is_empty(monkeypatch):
    """Of a rollout, a loss and an evaluation of choices, with gaps in every place."""
    seen = []

    def recording(module, query, key, value, attention_mask, **how):
        assert attention_mask.shape[-2:] == (query.shape[2], key.shape[2])
        seen.append(attention_mask.detach().clone())
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, **how
        )

    transformers.AttentionInterface.register("recording", recording)
    policy = tiny_policy("llama")
    policy.end_ids = set(range(0, 98, 9))  # early stops
    policy.model.set_attn_implementation("recording")
    monkeypatch.setattr(softcot, "STOP", " e")  # some CoTs are done, so that prefills differ
    seeds = seeds_for(30)
    r = sample(policy, SETTINGS["soft_sample"], seeds=seeds, max_cot=20, max_answer=9)
    gaps = [~mask for mask in (r.prompt_mask, r.cot.mask, r.prefill_mask, r.answer.mask)]
    assert all(gap.any() for gap in gaps)  # in every place
    rollout_masks = len(seen)
    softcot.policy_gradient(policy, r, torch.arange(30) - 14.5, 10**6)
    loss_masks = len(seen)
    row = {"ctx": "He sat", "endings": ["down", "on a chair", "up and ran away"], "label": "1"}
    choices.evaluate_choices(policy, "hellaswag", [row])
    assert 0 < rollout_masks < loss_masks < len(seen)
    for mask in seen:
        assert (mask == 0).any(dim=-1).all() and ((mask == 0) | (mask == -1e9)).all()


@pytest.mark.parametrize("bf16, given, taken", [(True, None, "bf16-mixed"), (False, None, "fp32"),
                                                (True, "bf16", "bf16"), (False, "bf16-mixed", None)])
def test_bf16_is_taken_where_a_gpu_has_it_and_is_never_emulated(bf16, given, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(  # as on a T4: yes, if emulation counts
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    if taken is None:
        with pytest.raises(softcot.UserError, match="no bf16"):
            softcot.filled(softcot.Config(model="m", dtype=given))
    else:
        config = softcot.filled(softcot.Config(model="m", dtype=given))
        assert (config.dtype, config.device) == (taken, "cuda")
        assert softcot.filled(softcot.Config()).device == "cpu"  # the toy


def test_a_gpu_is_given_tf32_and_an_attention_without_nan(tiny_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda how: seen.append(how))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: seen.append(on))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(device))
    monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda model, device: model)  # stays on the CPU
    config = softcot.filled(softcot.Config(model=str(tiny_folder), device="cpu"))
    softcot.load_policy(config, str(tiny_folder))
    assert seen == []
    softcot.load_policy(dataclasses.replace(config, device="cuda:0"), str(tiny_folder))
    assert seen == ["high", False, "cuda:0"]  # where graphs are made


def test_the_first_step_trains_and_the_warm_up_ends_at_the_peak(tiny_folder, tmp_path):
    tiny_run(tiny_folder, tmp_path / "a", "--warmup", "4", "--steps", "8")
    lr = [row["lr"] for row in read_lines(tmp_path / "a" / "metrics.jsonl")]
    assert lr[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert lr[4:] == sorted(lr[4:], reverse=True) and 0 < lr[-1] < 0.2e-3
    tiny_run(tiny_folder, tmp_path / "one", "--warmup", "4", "--steps", "1")
    old, new = (load_file(path / "model.safetensors") for path in (tiny_folder, tmp_path / "one" / "model"))
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_random_numbers_are_those_of_splitmix64_and_depend_on_the_row_alone():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    words = softcot.random_words(torch.tensor([1234567, 0]), torch.arange(4))
    assert [int(w) % 2**64 for w in words[0]] == known  # published for this seed
    state = np.uint64(0)  # the other row, in numpy's uint64
    for word in words[1]:
        state = (int(state) + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        assert int(word) % 2**64 == z ^ z >> 31
    seeds = softcot.row_seeds([(7, 0, 3, n, g) for n in range(20) for g in range(10)])
    assert len(set(seeds.tolist())) == 200
    assert seeds[13] == softcot.row_seeds([(7, 0, 3, 1, 3)])[0]
    u, eps = random_numbers(seeds, 30, 33)
    assert u.shape == (200, 30) and eps.shape == (200, 30, 33)
    few_u, few = random_numbers(seeds[[9, 2]], 12, 33)
    assert torch.equal(few, eps[[9, 2], :12]) and torch.equal(few_u, u[[9, 2], :12])
    for x, mean, var, fourth in ((eps, 0, 1, 3), (u, 0.5, 1 / 12, 1 / 80)):
        x = x.double().flatten()
        error = 4 / len(x) ** 0.5
        assert x.mean().item() == pytest.approx(mean, abs=error)
        assert x.var().item() == pytest.approx(var, abs=2 * error)
        assert ((x - mean) ** 4).mean().item() == pytest.approx(fourth, abs=12 * error)
    both = torch.corrcoef(torch.stack([eps[:, :, 0].flatten(), eps[:, :, 17].flatten(), u[:, :30].flatten()]))
    assert (both - torch.eye(3)).abs().max() < 4 / 6000**0.5  # pairs of Box and Muller, too
    assert 0 < u.min() and u.max() < 1


@pytest.mark.parametrize("at", ["embedding", *AT])
def test_what_only_a_loss_needs_is_not_kept_without_one(at, elsewhere):
    """V numbers a position for noise on logits: an evaluation would hold N T V of them."""
    seeds, found = torch.arange(len(PROMPTS)), []
    for keep in (True, False):
        module, policy, setting = with_noise_at(at, elsewhere, "llama")
        r = module.rollout(policy, PROMPTS, seeds, setting, 6, 3, 0.0, keep)
        found.append((r, policy.engine.buffers))
    (kept, full), (bare, few) = found
    assert {"x", "eps"} <= full.keys() and few.keys() == {"ids", "logp", "entropy"}
    assert bare.cot.x is None and bare.cot.eps is None
    for name in ("ids", "logp", "entropy", "mask"):
        assert torch.equal(getattr(bare.cot, name), getattr(kept.cot, name))
    assert bare.answers == kept.answers


@pytest.mark.parametrize("name", SETTINGS)
def test_one_engine_serves_many_rollouts(name, monkeypatch):
    """With looks every 5 positions, few columns in use, other prompts and weights: as a new one."""
    monkeypatch.setitem(softcot.LOOK, "cpu", 5)
    monkeypatch.setitem(softcot.BLOCK, "cpu", 4)
    policy, setting = tiny_policy("qwen2"), SETTINGS[name]
    policy.end_ids = set(range(0, 98, 9))  # rows end early and leave
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1e-3)
    batches = (PROMPTS, PROMPTS[1:2], ["a much longer prompt than those that came before it, " * 2])
    for step, prompts in enumerate(batches):
        seeds = softcot.row_seeds([(step, n) for n in range(4 * len(prompts))])
        r = sample(policy, setting, prompts, seeds, max_cot=14)
        for n in range(0, len(seeds), 3):
            one = plain_rollout(policy, prompts[n // 4], seeds[n], setting, 14, 5)
            tokens, inputs, logps, answer, answer_logps = one
            T, A = len(tokens), len(answer)
            assert r.cot.mask[n].sum() == T and r.answer.mask[n].sum() == A
            assert r.cot.ids[n, :T].tolist() == tokens and r.answer.ids[n, :A].tolist() == answer
            np.testing.assert_allclose(r.cot.logp[n, :T], logps, rtol=1e-3, atol=2e-3)
            np.testing.assert_allclose(r.answer.logp[n, :A], answer_logps, rtol=1e-3, atol=2e-2)
        if name.endswith("greedy"):
            continue
        softcot.policy_gradient(policy, r, torch.randn(len(seeds)), 10**6)
        optimizer.step()
        optimizer.zero_grad()


class Recorder:
    """Stands in for CUDA graphs: what is called inside graph() is kept, not run; replay() runs it."""

    def __init__(self, patch):
        self.recording, self.runs = None, []
        self.stream = types.SimpleNamespace(wait_stream=lambda _: None)
        self.strict = "default"
        for name, value in {
            "current_stream": lambda: self.stream, "CUDAGraph": self.new,
            "set_sync_debug_mode": lambda mode: setattr(self, "strict", mode),
            "stream": lambda _: contextlib.nullcontext(), "graph": self.graph,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)

    def new(self):
        return types.SimpleNamespace(replay=lambda: self.runs.append("replayed"))

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        self.recording = True
        yield
        self.recording = None


def test_a_step_is_run_once_then_recorded_and_replayed(monkeypatch):
    recorder = Recorder(monkeypatch)
    step = lambda: recorder.runs.append("recorded" if recorder.recording else recorder.strict)
    replay = softcot.run_and_record(step, None, recorder.stream)
    assert recorder.runs == ["error", "recorded"]
    for _ in range(3):
        replay()
    assert recorder.runs == ["error", "recorded", "replayed", "replayed", "replayed"]
    assert recorder.strict == "default"


def test_a_step_that_waits_for_the_host_is_run_as_it_is(monkeypatch, capsys):
    recorder = Recorder(monkeypatch)

    def step():
        if recorder.strict == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        recorder.runs.append("run")

    assert softcot.run_and_record(step, None, recorder.stream) is None
    assert recorder.runs == ["run"] and "not replayed" in capsys.readouterr().out
    failing = lambda: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        softcot.run_and_record(failing, None, recorder.stream)
    assert recorder.strict == "default"


@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_recorded_on_every_gpu_of_one_process(kind, replayed, monkeypatch):
    """An engine that believes to be on a GPU hands its first step of each shape to run_and_record(),
    once, and where a step can't be recorded nothing keeps the engine when it is forgotten."""
    policy, recorded = tiny_policy(kind), []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "stream")
    monkeypatch.setattr(softcot, "run_and_record",
                        lambda step, *shared: step() or recorded.append(shared) or (step if replayed else None))
    want = sample(policy, SETTINGS["soft_sample"])
    zeros = torch.zeros
    on_gpu = types.SimpleNamespace(type="cuda")
    gpu_model = types.SimpleNamespace(device=on_gpu, config=policy.model.config)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **how: zeros(*shape, **how))
    engine = softcot.Engine(dataclasses.replace(policy, model=gpu_model), 6, 128)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert engine.graphs == ("pool", "stream")
    policy.engine, engine.policy = engine, policy
    r = sample(policy, SETTINGS["soft_sample"])
    assert recorded == [("pool", "stream")] * len(engine.replays) and len(recorded) >= 2
    assert r.cots == want.cots and r.answers == want.answers
    if not replayed:
        forgotten, policy.engine, engine = weakref.ref(engine), None, None
        assert forgotten() is None


def test_a_micro_batch_is_as_large_as_the_memory_allows(monkeypatch):
    policy = tiny_policy("llama")
    # 2 layers of q, k, v, o [32 -> 32, 16, 16, 32] and gate, up, down [32 -> 48, 48, and back]
    token = 4 * 2 * (64 + 48 + 48 + 64 + 3 * 80)
    assert softcot.affordable_tokens(policy) == 2**32 // token
    names = ("parameters", "base_model", "get_input_embeddings")
    same = {name: getattr(policy.model, name) for name in names}
    gpu_model = types.SimpleNamespace(**same, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 2 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * 10**8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * 10**8)
    weights, V = sum(w.numel() for w in policy.model.parameters()), len(policy.tokenizer)
    free = 12 * 10**8 - 4 * weights - 2 * weights - 4 * (4 * 32 * V)  # gradients, casts, 4 heads
    mixed = types.SimpleNamespace(model=gpu_model, mixed=True)
    assert softcot.affordable_tokens(mixed) == int(0.6 * free / (token / 2))


@pytest.mark.parametrize("name", ["hard_sample", "soft_sample"])
@pytest.mark.parametrize("kind", (*KINDS, "gemma2"))
def test_prompts_read_once_and_chunks_give_the_gradient_of_a_plain_pass(kind, name, monkeypatch):
    policy = tiny_policy(kind)
    r = sample(policy, SETTINGS[name])
    advantages = torch.tensor([3.0, -1.0, 1.0, 2.0, 0.5, -4.0])
    monkeypatch.setattr(softcot, "CHUNK", 3 * len(policy.tokenizer))
    loss, grads = gradient_of(policy, r, advantages, 10**6)
    # the oracle: row by row, without padding, cache or chunks, and all logits kept
    policy.model.zero_grad()
    plain = 0
    for n in range(6):
        T, A = r.cot.mask[n].sum(), r.answer.mask[n].sum()
        P, F = r.prompt_mask[n].sum(), r.prefill_mask[n].sum()
        ids = [r.prompt_ids[n, :P], r.cot.ids[n, :T], r.prefill_ids[n, :F], r.answer.ids[n, :A]]
        parts = [policy.model.get_input_embeddings()(i) for i in ids]
        if name == "soft_sample":
            parts[1] = r.cot.x[n, :T]
        logits = policy.model(inputs_embeds=torch.cat(parts)[None]).logits[0]
        logp = torch.log_softmax(logits[P + T + F - 1 : -1], -1)[range(A), ids[3]].sum()
        before = logits[P - 1 : P + T - 1]
        if name == "soft_sample":
            mean = torch.softmax(before / 0.5, -1) @ policy.embeddings()
            logp = logp - (r.cot.x[n, :T] - mean).square().sum() / (2 * r.sigma**2)
        else:
            logp = logp + torch.log_softmax(before, -1)[range(T), ids[1]].sum()
        plain = plain - advantages[n] * logp / 6
    plain.backward()
    assert loss == pytest.approx(plain.item(), rel=1e-4)
    for parameter, weight in policy.model.named_parameters():
        if weight.grad is not None:
            scale = weight.grad.abs().max().clamp(min=1e-6)
            difference = (grads[parameter] - weight.grad) / scale
            assert difference.abs().max() < 2e-4, parameter


def test_no_gradient_of_a_weight_waits_for_the_prompts():
    """Autograd hands over a weight's gradient when all of its uses are done: that is, twice here."""
    policy = tiny_policy("llama")
    r = sample(policy, SETTINGS["soft_sample"])
    calls = collections.Counter()
    for name, weight in policy.model.base_model.layers.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: calls.update([name]))
    gradient_of(policy, r, torch.tensor([3.0, -1.0, 1.0, 2.0, 0.5, -4.0]), 10**6)
    assert len(calls) > 10 and set(calls.values()) == {2}, calls


@pytest.mark.parametrize("name", ["hard_sample", "soft_sample"])
def test_layers_have_the_same_gradient_under_frozen_embeddings(name):
    policy = tiny_policy("llama")
    how = (sample(policy, SETTINGS[name]), torch.tensor([3.0, -1.0, 1.0, 2.0, 0.5, -4.0]), 10**6)
    _, whole = gradient_of(policy, *how)
    policy.model.get_input_embeddings().weight.requires_grad_(False)
    _, frozen = gradient_of(policy, *how)
    layers = [name for name in whole if ".layers." in name]
    assert len(layers) > 10 and all(frozen[name].any() for name in layers)
    assert all(torch.equal(frozen[name], whole[name]) for name in layers)


def test_log_probabilities_in_chunks_equal_those_in_one_piece(monkeypatch):
    policy = tiny_policy("llama")
    r = sample(policy, SETTINGS["soft_sample"])
    advantages = torch.tensor([3.0, -1.0, 0.0, 2.0, 0.0, -4.0])
    loss, whole = gradient_of(policy, r, advantages, 10**6)
    monkeypatch.setattr(softcot, "CHUNK", 3 * len(policy.tokenizer))
    pieces_loss, pieces = gradient_of(policy, r, advantages, 10**6)
    assert pieces_loss == pytest.approx(loss, rel=1e-5)
    for name in whole:
        scale = whole[name].abs().max()  # rounding is up to 1e-5 of it, one position left out 0.15
        torch.testing.assert_close(pieces[name] / scale, whole[name] / scale, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["hard_sample", "soft_sample"])
def test_neighbours_and_padding_change_nothing(name):
    policy = tiny_policy("llama")
    seeds = seeds_for(6)
    together = sample(policy, SETTINGS[name], seeds=seeds)
    for b, prompt in enumerate(PROMPTS):
        alone = sample(policy, SETTINGS[name], [prompt], seeds[2 * b : 2 * b + 2])
        for n in range(2):
            assert alone.cots[n] == together.cots[2 * b + n]
            assert alone.answers[n] == together.answers[2 * b + n]
            ours = alone.cot.logp[n][alone.cot.mask[n]]
            theirs = together.cot.logp[2 * b + n][together.cot.mask[2 * b + n]]
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)


STOPS = {  # what the model writes -> the CoT (without what the last token adds) and its opening
    "so. The final answer is: 7": ("so. The final answer is:", " \\boxed{"),
    "The final answer is:\n\nno": ("The final answer is:", " \\boxed{"),
    "The final answer was 7, was it?": ("The final answer was 7", "The final answer is: \\boxed{"),
    "done<eos>never read, not at all": ("done", "The final answer is: \\boxed{"),
}


@pytest.mark.parametrize("name", ["hard_sample", "soft_greedy", "soft_sample", "fuzzy_sample"])
@pytest.mark.parametrize("extra", [(), ("final answer", " is: "), ("wer is:\n\n", "The f")])
def test_the_stop_phrase_counts_however_it_is_split(name, extra):
    tokenizer = char_tokenizer(extra)
    scripts = [tokenizer(text).input_ids for text in STOPS]
    policy = Policy(Scripted(tokenizer, list("abcd"), scripts), tokenizer)
    limit = len(tokenizer("The final answer was 7").input_ids)  # the third CoT is cut there
    limit = max(limit, len(tokenizer("so. The final answer is:").input_ids))
    r = softcot.rollout(policy, list("abcd"), seeds_for(4), SETTINGS[name], limit, 4, 1.0)
    assert r.stopped == [True, True, False, False]
    for n, (text, opening) in enumerate(STOPS.values()):
        assert r.cots[n].startswith(text)
        over = r.cots[n][len(text) :]
        assert over in (("", " ", "\n\n") if r.stopped[n] else ("", ", was"[: len(over)]))
        ended = tokenizer.eos_token_id in r.cot.ids[n][r.cot.mask[n]]
        assert ended == (n == 3) and (n != 2 or r.cot.mask[n].all())
        filled = tokenizer.decode(r.prefill_ids[n][r.prefill_mask[n]])
        assert filled == (opening.lstrip() if r.stopped[n] and over else opening)


def test_soft_inputs_have_the_type_of_the_embeddings_under_autocast():
    policy = tiny_policy("llama")
    policy.mixed = True
    r = sample(policy, SETTINGS["soft_sample"])
    assert r.cot.x.dtype == torch.float32
    _, _, moved = softcot.log_probs(policy, r)
    assert 0 < moved.max() < 0.5  # of a sigma: bf16 arithmetic


def test_bf16_weights_make_fp32_logits():
    """Logits of bf16 steps are 0.125 apart at 20, and temperature 0.5 doubles what that does."""
    policy = tiny_policy("llama")
    W, hidden = policy.model.bfloat16().lm_head.weight, 20 * torch.randn(4, 32).bfloat16()
    exact = hidden.double() @ W.double().T
    logits = policy.head(hidden.requires_grad_())
    assert logits.dtype == torch.float32 and exact.abs().max() > 16
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    for found, right in ((hidden.grad, 2 * exact @ W.double()), (W.grad, 2 * exact.T @ hidden.double())):
        assert found.dtype == torch.bfloat16
        assert ((found - right).abs() <= right.abs() / 256 + 1e-3).all()  # rounded once, at the end


def test_head_and_mixture_are_exact_under_autocast():
    policy, E = tiny_policy("llama"), torch.randn(9, 32)
    policy.mixed = True
    hidden = torch.randn(4, 32).bfloat16()
    with torch.no_grad(), policy.arithmetic():
        logits = policy.head(hidden)
        mixed = softcot.mixture(logits[:, :9], 0.5, E)
    oracle = hidden.double() @ policy.model.lm_head.weight.double().T
    torch.testing.assert_close(logits.double(), oracle, rtol=1e-5, atol=1e-5)
    oracle = torch.softmax(logits[:, :9].double() / 0.5, -1) @ E.double()
    torch.testing.assert_close(mixed.double(), oracle, rtol=1e-5, atol=1e-5)


@pytest.fixture
def tokenizers_as_saved(monkeypatch):
    """AutoTokenizer makes Qwen's of whatever stands beside a Qwen model; ours has no bytes in it."""
    as_saved = transformers.PreTrainedTokenizerFast.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", as_saved)


@pytest.mark.parametrize("dtype", ["fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_loaded_in_every_arithmetic(dtype, kind, tmp_path, tokenizers_as_saved):
    policy = tiny_policy(kind)
    policy.model.save_pretrained(tmp_path), policy.tokenizer.save_pretrained(tmp_path)
    config = softcot.filled(softcot.Config(device="cpu", dtype=dtype))
    policy = softcot.load_policy(config, str(tmp_path))
    for name in ("soft_sample", "hard_sample"):
        r = sample(policy, SETTINGS[name])
        softcot.policy_gradient(policy, r, torch.arange(6) - 2.5)
    grads = [w.grad for w in policy.model.parameters() if w.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


def test_an_engine_that_is_too_small_is_freed_before_the_next_one_is_made():
    policy = tiny_policy("llama")
    sample(policy, SETTINGS["soft_sample"])
    engine = weakref.ref(policy.engine)
    sample(policy, SETTINGS["soft_sample"], seeds=seeds_for(9))
    assert engine() is None


def test_a_policy_that_nobody_holds_is_freed():
    policy = tiny_policy("llama")
    sample(policy, SETTINGS["soft_sample"])
    model = weakref.ref(policy.model)
    del policy
    gc.collect()
    assert model() is None


def test_no_buffer_of_the_engine_moves_and_none_grows_while_rows_leave():
    """A recorded CUDA graph knows buffers by their address: they must be there in the next rollout."""
    policy = tiny_policy("llama")
    policy.end_ids = set(range(0, 98, 9))  # many rows end early

    def addresses():
        engine = policy.engine
        buffers = [x for k, x in vars(engine).items() if isinstance(x, torch.Tensor) and k != "columns"]
        buffers += [*engine.keys_and_values, *engine.buffers.values()]
        return {(x.data_ptr(), x.untyped_storage().nbytes()) for x in buffers}

    sample(policy, SETTINGS["soft_sample"], PROMPTS[2:], seeds_for(16), max_cot=40)
    before = addresses()
    sample(policy, SETTINGS["soft_sample"], PROMPTS[:2], seeds_for(14), max_cot=40)
    assert addresses() == before


def test_finished_rows_leave_the_batch_and_come_back_for_the_answer():
    tokenizer = char_tokenizer()
    texts = ["ab" * n + " The final answer is: }" for n in (1, 8, 2, 30)]
    model = Scripted(tokenizer, list("abcd"), [tokenizer(text).input_ids for text in texts])
    r = softcot.rollout(
        Policy(model, tokenizer), list("abcd"), seeds_for(4), SETTINGS["soft_sample"], 90, 4, 1.0
    )
    stop = len(" The final answer is:")
    assert r.cot.mask.sum(1).tolist() == [2 * n + stop for n in (1, 8, 2, 30)]
    # the prompts, T CoT inputs of 4, 2 and 1 rows, then the prefill of all 4
    steps = [4] * (4 + stop) + [2] * 12 + [1] * 44
    assert model.sizes[: len(steps) + 2] == [4] + steps + [4]
    for n, text in enumerate(texts):
        assert text.startswith(r.cots[n]) and r.answers[n] == "}"


def test_a_soft_cap_on_the_logits_is_part_of_the_head():
    policy = tiny_policy("gemma2")
    ids = torch.tensor([[5, 6, 7]])
    hidden = policy.model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(policy.head(hidden), policy.model(ids).logits)
    assert policy.head(100 * hidden).abs().max() <= 0.5


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_are_hard_tokens_in_every_mode(name):
    tokenizer = char_tokenizer()
    script = tokenizer("ab The final answer is: ??????42}9999").input_ids
    model = Scripted(tokenizer, ["Q"], [script])
    policy = Policy(model, tokenizer)
    r = softcot.rollout(policy, ["Q"], seeds_for(1), SETTINGS[name], 30, 8, 1.0)
    T = r.cot.mask.sum().item()
    # the prompt, T CoT inputs, the prefill, then the embeddings of single tokens
    assert len(model.fed) == 1 + T + 1 + r.answer.ids.shape[1]
    for fed in model.fed[T + 2 :]:
        assert (fed[0, 0] == model.embed.weight).all(1).any()
    assert r.answers[0] == "42}"[: len(r.answers[0])] or r.answers[0].endswith("}")


# ------------------------------------------------------------------------------------------------
# Parts 6 and 7: advantages, loss, gradient
# ------------------------------------------------------------------------------------------------


def test_rloo_advantages_equal_brute_force():
    rewards = torch.tensor(np.random.default_rng(0).choice([0.0, 10.0, 100.0], size=(5, 8)))
    ours = softcot.rloo_advantages(rewards)
    for b, g in itertools.product(range(5), range(8)):
        others = [rewards[b, i].item() for i in range(8) if i != g]
        assert ours[b, g].item() == pytest.approx(rewards[b, g].item() - sum(others) / 7)
    equal = torch.full((1, 32), 10.0)
    assert softcot.rloo_advantages(equal).abs().max() == 0


def test_pass_at_k_equals_brute_force_over_all_subsets():
    for n, correct in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if correct > n:
                continue
            samples = [i < correct for i in range(n)]
            subsets = list(itertools.combinations(samples, k))
            expected = sum(any(s) for s in subsets) / len(subsets)
            assert softcot.pass_at_k(n, correct, k) == pytest.approx(expected)
    with pytest.raises(ZeroDivisionError):
        softcot.pass_at_k(4, 1, 5)


def gradient_of(policy, r, advantages, micro_batch):
    policy.model.zero_grad()
    loss = softcot.policy_gradient(policy, r, advantages, micro_batch)["loss"]
    grads = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    return loss, grads


@pytest.mark.parametrize("name", ["hard_sample", "soft_sample"])
def test_micro_batches_and_skipped_rows_leave_loss_and_gradient_unchanged(name):
    policy = tiny_policy("llama")
    r = sample(policy, SETTINGS[name])
    advantages = torch.tensor([3.0, -1.0, 0.0, 2.0, 0.0, -4.0])
    whole_loss, whole = gradient_of(policy, r, advantages, 10**6)
    policy.model.zero_grad()
    cot, answer, _ = softcot.log_probs(policy, r)  # all six rows, none skipped
    loss = -(advantages * (cot.sum(1) + answer.sum(1))).sum() / 6
    loss.backward()
    assert whole_loss == pytest.approx(loss.item(), rel=1e-5)
    for micro_batch in (1, 150, 300):  # tokens
        part_loss, part = gradient_of(policy, r, advantages, micro_batch)
        assert part_loss == pytest.approx(whole_loss, rel=1e-5)
        for parameter in whole:
            scale = whole[parameter].abs().max()
            torch.testing.assert_close(
                part[parameter] / scale, whole[parameter] / scale, rtol=0, atol=1e-5
            )


def test_a_micro_batch_has_as_many_rows_as_its_tokens_allow_and_no_empty_columns(monkeypatch):
    policy = tiny_policy("llama")
    r = sample(policy, SETTINGS["hard_sample"], max_cot=40)
    r.cot.mask = torch.arange(40) < torch.tensor([39, 13, 1, 25, 8, 2])[:, None]
    longest = r.prompt_ids.shape[1] + r.prefill_ids.shape[1] + r.answer.ids.shape[1] + 40
    seen = []

    def log_probs(policy, part, real=softcot.log_probs):
        seen.append(part.cot.ids.shape)
        return real(policy, part)

    monkeypatch.setattr(softcot, "log_probs", log_probs)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5, -1.0])
    for tokens, shapes in (
        (1, [(1, 39), (1, 13), (1, 25), (1, 8), (1, 2)]),
        (2 * longest - 1, [(1, 39), (1, 13), (1, 25), (1, 8), (1, 2)]),
        (2 * longest, [(2, 39), (2, 25), (1, 2)]),
        (10**6, [(5, 39)]),
    ):
        seen.clear()
        gradient_of(policy, r, advantages, tokens)
        assert seen == shapes


def test_equal_rewards_give_no_gradient_and_no_error():
    policy = tiny_policy("llama")
    r = sample(policy, SETTINGS["soft_sample"])
    loss, grads = gradient_of(policy, r, torch.zeros(6), 10**6)
    assert loss == 0 and not grads


class Dynamics(nn.Module):
    """A "model" with a memory of one input: logits = a x + c, for embeddings of width 1."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 1, _weight=torch.tensor([[-1.0], [0.2], [1.5]]))
        self.head = nn.Linear(1, 3)
        self.head.load_state_dict(
            {"weight": torch.tensor([[0.5], [-1.0], [0.8]]), "bias": torch.tensor([0.1, 0.3, -0.2])}
        )
        self.a, self.c = self.head.weight, self.head.bias
        self.device, self.config = torch.device("cpu"), transformers.LlamaConfig()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def base_model(self, input_ids=None, inputs_embeds=None, **_):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return BaseModelOutput(last_hidden_state=x)


def test_reinforce_on_soft_tokens_gives_the_gradient_of_the_smoothed_expected_reward():
    """Two soft tokens of width 1: E[R] is a double integral, done on a grid in float64."""
    tau, sigma, start = 0.5, 0.4, 0.7
    model = Dynamics()
    policy = Policy(model, None)

    def right(x1, x2):
        return (x1 > 0.1) & (x1 + x2 < 0.9)

    # the oracle: J = integral of N(x1; h(start)) N(x2; h(x1)) R(x1, x2), gradient by autograd
    E, a, c = (t.detach().double().requires_grad_() for t in (model.embed.weight, model.a, model.c))
    grid = torch.linspace(-4, 4, 1601, dtype=torch.float64)

    def density(x, past):
        mean = torch.softmax((past[:, None] * a[:, 0] + c) / tau, -1) @ E  # [len(past), 1]
        z = (x[None] - mean) / sigma
        return torch.exp(-(z**2) / 2) / (sigma * math.sqrt(2 * math.pi))

    first = density(grid, torch.tensor([start], dtype=torch.float64))[0]
    J = (first[:, None] * density(grid, grid) * right(grid[:, None], grid[None])).sum()
    J = J * (grid[1] - grid[0]) ** 2
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(J, (E, a, c))])

    # ours: many independent small batches, for a mean and its standard error
    torch.manual_seed(0)
    estimates = []
    for _ in range(40):
        B, G = 500, 8
        N = B * G
        x = torch.full((N, 1, 1), start)
        inputs, noise = [], torch.randn(N, 2, 1)
        for t in range(2):
            mean = softcot.mixture(model.head(x), tau, model.embed.weight).detach()
            x = mean + sigma * noise[:, t : t + 1]
            inputs.append(x)
        inputs = torch.cat(inputs, 1)
        rewards = right(inputs[:, 0, 0], inputs[:, 1, 0]).float()
        none, no = torch.zeros(N, 1, dtype=torch.long), torch.zeros(N, 1, dtype=torch.bool)
        # The prompt is one token whose embedding is `start`: a constant, given through the CoT
        # columns by one more column in front, without noise, so that its score is 0.
        r = softcot.Rollout(
            setting=Setting("soft", tau, 1.0), sigma=sigma, prompt_ids=none, prompt_mask=~no,
            prefill_ids=none, prefill_mask=no,
            cot=softcot.Phase(
                torch.zeros(N, 3, dtype=torch.long), torch.zeros(N, 3), torch.zeros(N, 3),
                mask=torch.ones(N, 3, dtype=torch.bool),
                x=torch.cat([torch.full((N, 1, 1), start), inputs], 1),
                eps=torch.cat([torch.zeros(N, 1, 1), noise], 1),
            ),
            answer=softcot.Phase(none, torch.zeros(N, 1), torch.zeros(N, 1), mask=no),
            stopped=[True] * N, cots=[""] * N, answers=[""] * N,
        )  # fmt: skip
        model.zero_grad()
        advantages = softcot.rloo_advantages(rewards.view(B, G)).flatten()
        softcot.policy_gradient(policy, r, advantages, 10**6)
        grads = (model.embed.weight.grad, model.a.grad, model.c.grad)
        estimates.append(-torch.cat([g.flatten() for g in grads]))  # ascent direction
    estimates = torch.stack(estimates).double()
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - expected).abs() < 4.5 * error).all()
    assert (error < 0.15 * expected.abs().max()).all()  # the comparison is a sharp one


# ------------------------------------------------------------------------------------------------
# Part 9: answers, rewards, data
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, gold, expected",
    [
        ("18}", "18", 100),
        ("$1,200.00}.", "1200", 100),
        ("\\$18}", "18", 100),
        ("-3}", "-3", 100),
        ("18 \\text{ eggs}}", "18", 100),
        ("50\\%}", "50", 100),
        (".5}", "0.5", 100),
        ("17}", "18", 10),
        ("-18}", "18", 10),
        ("}", "18", 10),
        ("9+9}", "18", 10),
        ("__import__('os')}", "18", 10),
        ("18", "18", 0),
        ("", "18", 0),
        ("\\frac{18}{1", "18", 0),
    ],
)
def test_rewards_are_100_for_right_10_for_boxed_and_0_otherwise(answer, gold, expected):
    assert softcot.reward(answer, gold, softcot.same_number) == expected


def test_the_graders_agree_with_the_labelled_answers_where_they_are_not_known_to_be_wrong(capsys):
    pairs = [json.loads(line) for line in answers.PAIRS.read_text(encoding="utf-8").splitlines()]
    assert len({(p["grader"], p["gold"], p["answer"]) for p in pairs}) == len(pairs) >= 420
    labels = [(p["grader"], p["equal"]) for p in pairs]
    kinds = itertools.product(answers.GRADERS, (True, False))
    assert min(labels.count(kind) for kind in kinds) >= 150
    assert answers.main() == 0, capsys.readouterr().out


def test_the_toy_is_graded_without_math_verify_whatever_it_writes(monkeypatch):
    tokenizer, draw = toy_tasks.make_tokenizer(), np.random.default_rng(0)
    monkeypatch.setattr(softcot, "GRADER", None)
    for length in draw.integers(1, 7, 3000):
        text = tokenizer.decode(draw.integers(len(tokenizer), size=length))
        inside = softcot.boxed(text + "}") or ""
        number = re.fullmatch(r"(?:.*[^\d\s.<>=].*=)? *\+?0*17 *", inside)  # 17, +17, 3+14=17
        assert softcot.same_number(inside, "17") == bool(number), inside
    for garbage in ("2" * 10_000, "x" * 10_000, "2 " * 5_000, "1," * 5_000, " " * 10_000 + "="):
        assert not softcot.same_number(garbage, "17")


def test_an_answer_that_is_not_graded_as_labelled_is_seen(tmp_path, monkeypatch, capsys):
    pairs = [{"grader": "number", "gold": "1", "answer": "1", "equal": True}]
    monkeypatch.setattr(answers, "PAIRS", tmp_path / "answers.jsonl")
    for more, status in [({}, 0), ({"known": "why"}, 1), ({"equal": False}, 1),
                         ({"equal": False, "known": "why"}, 0)]:  # fmt: skip
        answers.PAIRS.write_text(json.dumps(pairs[0] | more))
        assert answers.main() == status
        assert ("rewarded though wrong: 1" in capsys.readouterr().out) == ("equal" in more)


def test_a_box_is_read_to_its_own_closing_brace():
    assert softcot.boxed("\\frac{1}{2}} and {more}") == "\\frac{1}{2}"
    assert softcot.boxed("\\{1, 2\\}}") == "\\{1, 2\\}"
    assert softcot.boxed("\\frac{1}{2}") is None
    assert softcot.boxed("1\\\\} x}") == "1\\\\"  # a line break, then the end
    assert softcot.boxed("a\\\\{b}} x}") == "a\\\\{b}"


def test_no_answer_can_hang_the_grader_and_a_dead_one_is_replaced():
    grader = softcot.Grader()
    grader.limit = 1
    towers = ["10^{10^{10^{10}}}", "9^{9^{9^{9^{9}}}}", "x" * 10_000, "2" * 10_000]
    assert not any(grader.equal(answer, "2") for answer in towers)
    del grader.limit
    assert grader.equal("1+1", "2")
    grader.process.kill()
    grader.process.wait()
    assert grader.equal("1+1", "2")
    # Ctrl-C goes to the group of the terminal: the step under way still needs its grader
    assert os.getpgid(grader.process.pid) != os.getpgrp()


def test_a_verdict_that_nobody_waited_for_is_not_taken_for_the_next_one():
    """After Ctrl-C in a notebook, and when the process is killed just before it is asked."""
    grader = softcot.Grader()
    assert grader.equal("1+1", "2")

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

    grader.process.stdout = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        grader.equal("1/2", "0.6")
    assert grader.equal("1/4", "0.25") and not grader.equal("1/8", "0.126")
    grader.process.kill()
    while Path(f"/proc/{grader.process.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    seen = iter([None])  # not yet known to be dead
    grader.process.poll = lambda: next(seen, -9)
    assert not grader.equal("1/8", "0.125") and grader.timeouts == 2
    assert grader.equal("1/8", "0.125")


def test_gold_answers_are_found_in_the_rows_of_every_data_set():
    assert softcot.gold_answer({"answer": "So 3*4=12.\n#### 1,200"}) == "1,200"
    solution = r"First \boxed{1}, so the answer is \boxed{\frac{a}{b}}."
    assert softcot.gold_answer({"solution": solution}) == r"\frac{a}{b}"
    assert softcot.gold_answer({"solution": "no box"}) == ""
    assert softcot.gold_answer({"final_answer": ["$69$,$84$"], "error": None}) == "69, 84"
    assert softcot.gold_answer({"answer": ["120,150"]}) == "120, 150"  # two, not 120150
    assert softcot.gold_answer({"answer": ["4.2"], "error": "1e-1"}) == "4.2 within 1e-1"
    assert softcot.gold_answer({"answer": "5", "solution": r"\boxed{6}"}) == "5"


def test_a_file_of_ones_own_is_split_three_ways_and_its_faulty_rows_are_counted(tmp_path, capsys):
    rows = [{"problem": f"{i}?", "answer": i} for i in range(100)]
    rows += [{"question": "5?", "answer": "5"}, {"problem": "empty?", "answer": " "}]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = softcot.Config(model="m", task=str(path))
    parts = [softcot.load_problems(config, str(path), s) for s in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [80, 10, 10]
    assert len({problem.id for part in parts for problem in part}) == 100
    assert "2 repeated or without an answer" in capsys.readouterr().out


def test_a_small_file_whose_name_begins_like_the_toy_is_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}?", "answer": i} for i in range(5)]
    Path("toys.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = softcot.Config(model="m", task="toys.jsonl")
    parts = [softcot.load_problems(config, config.task, s) for s in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [3, 1, 1]
    assert {problem.gold for part in parts for problem in part} == set("01234")


def test_gsm8k_rows_become_problems_and_validation_is_disjoint_and_stable(tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    lines = [
        json.dumps({"question": f"What is {i}+1?", "answer": f"So {i}+1.\n#### {i + 1:,}"})
        for i in range(2000)
    ]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n\n")
    config = softcot.Config(model="m", task="gsm8k", data_dir=str(tmp_path))
    training = softcot.load_problems(config, "gsm8k", "train")
    held_out = softcot.load_problems(config, "gsm8k", "validation")
    assert len(held_out) == 128 and len(training) == 1872
    assert not {p.id for p in training} & {p.id for p in held_out}
    assert held_out == softcot.load_problems(dataclasses.replace(config, seed=9), "gsm8k", "validation")
    for problem in training[:50]:
        assert f"User: What is {problem.id}+1?\nAssistant:" in problem.prompt
        assert softcot.same_number(str(problem.id + 1), problem.gold)


def test_every_epoch_of_training_sees_every_problem_once():
    problems = [Problem(i, "", "", softcot.same_number) for i in range(10)]
    seen = [p.id for step in range(10) for p in softcot.prompts_of_step(problems, step, 3, seed=4)]
    for epoch in range(3):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]


def test_toy_problems_for_testing_are_not_among_those_for_training():
    train = {row["question"] for row in toy_tasks.rows("toy", "train")}
    assert len(train) == toy_tasks.TRAIN
    for name, largest in toy_tasks.LARGEST.items():
        rows = toy_tasks.rows(name, "test")
        test, pool = {row["question"] for row in rows}, toy_tasks.pool(name)
        assert len(test) == toy_tasks.TEST and not train & test
        end = toy_tasks.EQUALS[name]
        assert not test & {"+".join(map(str, terms)) + end for terms in pool.tolist()}
        assert len(pool) + len(test) == largest**6 - (5**6 if name == "toy-large" else 0)
        for row in rows[:20]:
            terms = [int(n) for n in row["question"].removesuffix(end).split("+")]
            assert len(terms) == 6 and max(terms) <= largest
            assert name != "toy-large" or max(terms) > 5
            if name != "toy-round":
                assert int(row["answer"]) == sum(terms)
    answers = [toy_tasks.answer("toy-round", x) for x in ([3, 2, 5, 1], [3, 1, 1, 5], [1, 2, 3])]
    assert answers == [5, 5, 6]  # at once, on the way, none: all of it


def test_toy_walks_go_on_by_one_and_wrong_answers_jump():
    for row in toy_tasks.rows("toy-walk", "test"):
        ways = [row["question"].replace("=", "") + option for option in row["options"]]
        right, wrong = (np.diff([int(n) for n in way.split()]) for way in ways)
        assert len(right) == 7 and (abs(right) == 1).all() and row["answer"] == 0
        assert (abs(wrong) != 1).sum() == 1  # one jump


def test_toy_pretraining_text_is_what_the_tokenizer_reads():
    tokenizer = toy_tasks.make_tokenizer()
    generator = torch.Generator().manual_seed(0)
    for name in toy_tasks.LARGEST:
        stops = {True: [], False: []}
        terms = toy_tasks.all_sums(name)[:500]
        ids, labels = toy_tasks.sum_texts(name, terms, tokenizer.get_vocab(), generator)
        for row, target, numbers in zip(ids, labels, terms.tolist()):
            text = tokenizer.decode(row, skip_special_tokens=True)
            question, _, reply = text.partition("=")
            assert question + "=" == "+".join(map(str, numbers)) + toy_tasks.EQUALS[name]
            thought, _, answer = reply.partition("The final answer is: \\boxed{")
            totals = [int(t) for t in thought.split()]
            assert totals == list(itertools.accumulate(numbers))[1 : len(totals) + 1]
            assert answer == f"{totals[-1]}}}"
            kept = target[target != -100]
            assert tokenizer.decode(kept) == reply + "<eos>"
            assert tokenizer(text).input_ids == row[: len(tokenizer(text).input_ids)].tolist()
            for i, total in enumerate(totals[: toy_tasks.TERMS - 2]):
                stops[total % 5 == 0].append(i == len(totals) - 1)
        seen = [np.mean(stops[multiple]) for multiple in (True, False)]
        assert np.allclose(seen, toy_tasks.STOP[name], atol=0.06)
    ids, labels = toy_tasks.walk_texts(50, tokenizer.get_vocab(), generator)
    for row, target in zip(ids, labels):
        text = tokenizer.decode(row)
        question, answer = text.split("=")
        assert tokenizer(text).input_ids == row.tolist()
        assert len(question.split()) == len(answer.split()) == 4
        assert tokenizer.decode(target[target != -100]) == answer
        assert set(abs(np.diff([int(n) for n in text.replace("=", "").split()]))) == {1}


# ------------------------------------------------------------------------------------------------
# Parts 8, 10, 12 and 15: evaluation, models, files, the program
# ------------------------------------------------------------------------------------------------


def untrained_toy(folder, louder, **shape):
    """Save an untrained model of this shape, some tokens of which are likelier than others."""
    tokenizer = toy_tasks.make_tokenizer()
    torch.manual_seed(0)
    ids = dict(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, initializer_range=0.5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ids, **shape))
    with torch.no_grad():
        for word, factor in louder.items():
            model.lm_head.weight[tokenizer.get_vocab()[word]] *= factor
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """An untrained toy model in a folder: quick to load, good enough for plumbing."""
    louder = {"}": 4, "The final answer is:": 1.5}  # boxes close, CoTs stop, so rewards differ
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return untrained_toy(tmp_path_factory.mktemp("tiny"), louder, **shape)


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory):
    """The same of two layers, with one matrix for embeddings and head, and shapes not even."""
    shape = dict(hidden_size=18, intermediate_size=17, num_hidden_layers=2, num_attention_heads=3)
    shape |= dict(num_key_value_heads=1, tie_word_embeddings=True)
    return untrained_toy(tmp_path_factory.mktemp("tied"), {"}": 3}, **shape)


SMALL = "--prompts 2 --samples 4 --eval-limit 4 --eval-k 2 --warmup 0 --lr 1e-3"
SMALL = [*SMALL.split(), "--eval-settings", "soft_greedy", "hard_sample"]  # two of six


def tiny_run(folder, out, *more):
    """Run the program in this process on the untrained toy; returns its exit status."""
    return softcot.main(["--model", str(folder), "--out-dir", str(out), *SMALL, *more])


def read_json(path):
    return json.loads(path.read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def break_after(patch, step):
    """Let a run break off right after it has written the metrics of a step."""

    def append(path, row, real=softcot.append_jsonl):
        real(path, row)
        if path.name == "metrics.jsonl" and row["step"] == step:
            raise KeyboardInterrupt

    patch.setattr(softcot, "append_jsonl", append)


class FewPictures(matplotlib.figure.Figure):
    """A figure of curves: the first one is drawn, in half a second, and the others are copies."""

    drawn = []

    def savefig(self, path, **how):
        if not self.drawn:
            super().savefig(path, **how)
            self.drawn.append(path.read_bytes())
        path.write_bytes(self.drawn[0])


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """The runs of the tests draw one picture between them; its rows are read each time."""
    monkeypatch.setattr(softcot, "Figure", FewPictures)


TIMES = ("rollout_s", "train_s", "tokens_per_s")


def test_a_state_saved_before_the_first_gradient_changes_nothing(tiny_folder, tmp_path):
    """torch makes missing moments by a step of the optimiser, which Adam would count."""

    def flat(policy, problems, G, labels, *how, real=softcot.rewarded, **keep):
        r, rewards = real(policy, problems, G, labels, *how, **keep)
        return r, rewards * (labels[1:] != (0, 0))  # no mixed group in the first step

    def append(path, row, real=softcot.append_jsonl):
        real(path, row)
        if path.name == "metrics.jsonl" and row["step"] == 1:
            softcot.SIGNALS.append(2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softcot, "rewarded", flat)
        assert tiny_run(tiny_folder, tmp_path / "whole", "--steps", "4") == 0
        with pytest.MonkeyPatch.context() as signalled:
            signalled.setattr(softcot, "append_jsonl", append)
            signalled.setattr(softcot, "SIGNALS", [])
            assert tiny_run(tiny_folder, tmp_path / "cut", "--steps", "4") == 0
        assert len(read_lines(tmp_path / "cut" / "metrics.jsonl")) == 1
        assert tiny_run(tiny_folder, tmp_path / "cut", "--steps", "4", "--resume") == 0
    whole, cut = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert whole[0]["mixed_groups"] == 0 and whole[1]["mixed_groups"] > 0
    for a, b in zip(whole, cut, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {k: b[k] for k in a if k not in TIMES}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_without_a_gradient_are_saved_and_resumed(dtype, tmp_path):
    """A model may have parts that no text uses: the eyes of one that also sees."""
    policies = [tiny_policy("llama") for _ in range(2)]
    states = []
    for policy in policies:
        policy.model.eye = nn.Linear(3, 3)
        policy.model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        states.append((policy, softcot.make_optimizer(policy, softcot.Config(dtype=dtype, lr=1e-3, steps=4))))
    policy, optimizer = states[0]
    policy.model(torch.tensor([[3, 4]])).logits.sum().backward()
    optimizer.step()
    softcot.save_state(tmp_path / "state.pt", *states[0], 1, 0.5)
    assert softcot.load_state(tmp_path / "state.pt", *states[1]) == (1, 0.5)
    for ours, theirs in zip(*(policy.model.parameters() for policy in policies)):
        assert torch.equal(ours, theirs)
        a, b = states[0][1].state[ours], states[1][1].state[theirs]
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_training_has_the_memory_of_a_longer_validation(tiny_folder, tmp_path):
    config = softcot.filled(softcot.Config(cot="soft", eval_max_cot=40, max_cot=4, samples=4, prompts=2))
    policy = softcot.load_policy(config, str(tiny_folder))
    problems = [Problem(i, "1+2=", "3", lambda *_: False) for i in range(2)]
    softcot.checkpoint(policy, config, tmp_path, problems, 0, -1.0)
    softcot.rewarded(policy, problems, 4, (0, 0), SETTINGS["soft_sample"], 4, 2, 1.0)
    assert policy.engine.L < 40


def test_a_tokenizer_with_several_chat_templates_is_saved(tiny_folder, tmp_path):
    config = softcot.filled(softcot.Config(cot="hard"))
    policy = softcot.load_policy(config, str(tiny_folder))
    policy.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    softcot.checkpoint(policy, config, tmp_path, [], 1, 0.0)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved.chat_template == policy.tokenizer.chat_template


def test_a_problem_that_comes_twice_in_a_step_has_other_noise_the_second_time():
    policy = tiny_policy("llama")
    problems = [Problem(i, "Hi", "1", lambda *_: False) for i in (7, 8)]
    how = ((5, 0, 0), SETTINGS["soft_sample"], 4, 2, 1.0)
    (first, _), (twice, _) = (
        softcot.rewarded(policy, which, 2, *how) for which in (problems, [*problems, problems[0]])
    )
    assert torch.equal(first.cot.ids[:4], twice.cot.ids[:4])
    for n, m in itertools.combinations(range(6), 2):
        assert not torch.equal(twice.cot.x[n], twice.cot.x[m])


def test_each_process_samples_its_rows_and_all_know_all_rewards(monkeypatch):
    policy, calls = tiny_policy("llama"), []
    problems = [Problem(b, PROMPTS[b], "1", lambda *_: False) for b in range(2)]
    monkeypatch.setattr(softcot, "reward", lambda *_: calls.append(0) or 10.0 * len(calls))
    how = (SETTINGS["hard_sample"], 3, 2, 1.0)
    whole, _ = softcot.rewarded(policy, problems, 3, (0,), *how)
    calls.clear()
    monkeypatch.setattr(softcot, "RANK", 1)
    monkeypatch.setattr(softcot, "PROCESSES", 2)
    monkeypatch.setattr(softcot, "gather", lambda own: [[1.0, 2.0, 3.0], own])
    r, rewards = softcot.rewarded(policy, problems, 3, (0,), *how)
    assert rewards.tolist() == [[1.0, 10.0, 2.0], [20.0, 3.0, 30.0]]
    assert r.cots == whole.cots[1::2] and r.answers == whole.answers[1::2]


def test_a_process_without_a_row_has_none(monkeypatch):
    policy, problem = tiny_policy("llama"), Problem(0, PROMPTS[0], "1", lambda *_: False)
    monkeypatch.setattr(softcot, "RANK", 1)
    monkeypatch.setattr(softcot, "PROCESSES", 2)
    monkeypatch.setattr(softcot, "gather", lambda own: [[100.0], own])
    how = (SETTINGS["soft_sample"], 3, 2, 1.0)
    r, rewards = softcot.rewarded(policy, [problem], 1, (0,), *how)
    assert rewards.tolist() == [[100.0]] and r.cots == [] and r.cot.mask.sum() == 0


def test_an_evaluation_asks_the_device_for_no_float64(monkeypatch):
    """A Mac's GPU has none."""
    policy, config = tiny_policy("llama"), softcot.filled(softcot.Config())
    real = softcot.rewarded

    def rewarded(*how, **more):
        r, rewards = real(*how, **more)
        whole = r.cot.entropy
        r.cot.entropy = types.SimpleNamespace(cpu=lambda: whole)
        return r, rewards

    monkeypatch.setattr(softcot, "rewarded", rewarded)
    problems = [Problem(0, PROMPTS[0], "1", lambda *_: False)]
    config = dataclasses.replace(config, eval_max_cot=4)
    scores = softcot.evaluate(policy, problems, SETTINGS["hard_greedy"], config, 1)
    assert scores["cot_entropy"] > 0


@pytest.mark.parametrize("wrong", [{"rms_norm_eps": "1e-6"}, {"num_attention_heads": 0}, {"num_attention_heads": 5}])
def test_a_model_whose_config_is_wrong_is_one_line(wrong, tiny_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = read_json(folder / "config.json") | wrong
    (folder / "config.json").write_text(json.dumps(config))
    line = one_line_error(capsys, ["--model", str(folder), "--out-dir", str(tmp_path / "out")])
    assert f"--model {folder} can't be used" in line


@pytest.mark.parametrize("special", [True, False])
def test_tokens_without_an_embedding_are_refused_unless_no_text_has_them(
    special, tiny_folder, tmp_path, capsys
):
    """The tokenizer of some text-only models knows a token for images, which they have not."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=special)
    tokenizer.save_pretrained(folder)
    status = tiny_run(folder, tmp_path / "out", "--eval-only", "--eval-settings", "soft_greedy")
    assert status == (0 if special else 2)
    assert ("its tokenizer is larger" in capsys.readouterr().err) != special


def test_a_model_that_cannot_be_fed_soft_tokens_is_refused_in_one_line(tmp_path, capsys):
    """Mamba has no keys and values."""
    tokenizer = toy_tasks.make_tokenizer()
    size = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, eos_token_id=1)
    config = transformers.MambaConfig(**size, state_size=4, expand=1, pad_token_id=0)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert tiny_run(tmp_path / "model", tmp_path / "out") == 2
    assert "can't be used" in capsys.readouterr().err


@pytest.mark.parametrize("cot", ["soft", "fuzzy", "hard"])
def test_the_same_seed_gives_the_same_run_and_resume_continues_it_to_the_bit(
    cot, tiny_folder, tmp_path
):
    whole, again, cut = tmp_path / "whole", tmp_path / "again", tmp_path / "cut"
    more = ("--cot", cot, "--steps", "4", "--eval-settings", f"{cot}_sample")
    assert tiny_run(tiny_folder, whole, *more) == 0
    assert tiny_run(tiny_folder, again, *more) == 0

    with pytest.MonkeyPatch.context() as patch:
        break_after(patch, 3)  # in the middle of a step that will be done again
        with pytest.raises(KeyboardInterrupt):
            tiny_run(tiny_folder, cut, *more)
    assert len(read_lines(cut / "metrics.jsonl")) == 3
    assert tiny_run(tiny_folder, cut, *more, "--resume") == 0

    state = torch.load(whole / "state.pt", weights_only=True)["model"]
    for other in (again, cut):
        pairs = zip(read_lines(whole / "metrics.jsonl"), read_lines(other / "metrics.jsonl"), strict=True)
        for ours, theirs in pairs:
            for key in set(ours) - set(TIMES):
                assert ours[key] == theirs[key], key
        assert (whole / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
        theirs = torch.load(other / "state.pt", weights_only=True)["model"]
        assert all(torch.equal(state[key], theirs[key]) for key in state)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    assert any(not torch.equal(base[key], state[key]) for key in state)  # something was learnt


def one_line_error(capsys, arguments, progress=False):
    """The one line that a wrong call prints; asserts exit status 2 and nothing more."""
    capsys.readouterr()
    assert softcot.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    lines = lines[-1:] if progress else lines  # behind a progress bar
    assert len(lines) == 1 and lines[0].startswith("softcot.py: error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--colour red", "--colour"),
        ("--step 3", "--step"),  # no abbreviations
        ("--steps three", "--steps"),
        ("--steps", "--steps"),
        ("--cot loud", "--cot"),
        ("--dtype fp8", "--dtype"),
        ("--task chess", "task chess is unknown: choose from toy"),
        ("--task gsm8k", "--model"),
        ("--samples 1", "--samples 1"),
        ("--steps 0", "--steps 0"),
        ("--seed 9223372036854775808", "--seed 9223372036854775808: give 0 to 2147483647"),
        ("--micro-batch 0", "--micro-batch 0"),
        ("--lr -1", "--lr -1"),
        ("--lr nan", "--lr nan"),
        ("--tau 0", "--tau 0"),
        ("--sigma-scale 0", "--sigma-scale 0"),
        ("--cot hard --sigma-scale 0.3", "--sigma-scale"),
        ("--eval-settings soft_loud", "soft_loud"),
        ("--eval-only --resume", "--resume"),
        ("--eval-only --eval-limit 0", "--eval-limit 0"),
        ("--resume --out-dir OUT", "--resume"),
        ("--model NOWHERE --out-dir OUT", "--model"),
        ("--model EMPTY --out-dir OUT", "--model"),
        ("--model UNTOKENIZED --out-dir OUT", "tokenizer"),
        ("--model TINY --task gsm8k --data-dir NOWHERE --out-dir OUT", "there is no file"),
        ("--model TINY --task gsm8k --data-dir BROKEN --out-dir OUT", "line 2"),
        ("--model TINY --task gsm8k --data-dir LISTS --out-dir OUT", "row 1"),
        ("--model TINY --task gsm8k --data-dir FIELDS --out-dir OUT", "question"),
        ("--model TINY --task gsm8k --data-dir BLANK --out-dir OUT", "empty"),
        ("--model TINY --task gsm8k --out-dir OUT", "--data-dir DIR"),
        ("--model TINY --task math500 --out-dir OUT", "--task math500"),
        ("--model TINY --task OUT/mine.jsonl --out-dir OUT", "there is no file"),
        ("--model TINY --eval-tasks chess --out-dir OUT", "task chess is unknown"),
        ("--device abacus --model TINY --out-dir OUT", "--device abacus"),
        ("--out-dir FILE --model TINY", "--out-dir"),
    ],
)
def test_a_mistake_gets_one_line_that_names_it(arguments, says, capsys, tmp_path, tiny_folder):
    good = json.dumps({"question": "1+1?", "answer": "#### 2"})
    contents = {"BROKEN": good + "\n{oops\n", "LISTS": "[1]\n", "FIELDS": '{"a": 1}\n', "BLANK": ""}
    for name, text in contents.items():
        (tmp_path / name / "gsm8k").mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / name / "gsm8k" / f"{split}.jsonl").write_text(text)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("not a folder")
    (tmp_path / "UNTOKENIZED").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "UNTOKENIZED" / name).write_bytes((tiny_folder / name).read_bytes())
    for name in ("NOWHERE", "EMPTY", "UNTOKENIZED", "FILE", "OUT", *contents):
        arguments = arguments.replace(name, str(tmp_path / name))
    line = one_line_error(capsys, arguments.replace("TINY", str(tiny_folder)).split())
    assert says in line


def test_a_resumed_run_may_not_change_its_settings(tiny_folder, tmp_path, capsys):
    assert tiny_run(tiny_folder, tmp_path / "run", "--steps", "2", "--eval-limit", "0") == 0
    small = "--prompts 2 --samples 4 --eval-limit 0 --eval-k 2 --warmup 0 --lr 2e-3 --steps 2"
    line = one_line_error(
        capsys,
        ["--model", str(tiny_folder), "--out-dir", str(tmp_path / "run"), "--resume", *small.split()],
    )
    assert "--lr" in line and "--steps" not in line


def test_a_run_that_was_moved_can_be_resumed(tiny_folder, tmp_path):
    assert tiny_run(tiny_folder, tmp_path / "run", "--steps", "2", "--eval-limit", "0") == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    again = ("--steps", "2", "--eval-limit", "0", "--resume")
    assert tiny_run(tiny_folder, tmp_path / "moved", *again) == 0


def test_evaluation_alone_runs_what_was_asked_for_and_touches_nothing_else(tiny_folder, tmp_path):
    arguments = f"--eval-only --model {tiny_folder} --out-dir {tmp_path} --eval-limit 5".split()
    arguments += ["--eval-k", "3"]
    assert softcot.main([*arguments, "--eval-settings", "hard_greedy", "soft_greedy"]) == 0
    assert softcot.main([*arguments, "--eval-settings", "fuzzy_sample"]) == 2  # the folder is taken
    assert softcot.main([*arguments, "--eval-settings", "fuzzy_sample", "--resume"]) == 0
    records = read_json(tmp_path / "eval.json")
    assert [r["setting"] for r in records] == ["hard_greedy", "soft_greedy", "fuzzy_sample"]
    assert [(r["n"], list(r["k"])) for r in records] == [(1, ["1"]), (1, ["1"]), (3, ["1", "2", "3"])]
    assert {(r["stage"], r["task"], r["problems"]) for r in records} == {("base", "toy", 5)}
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "eval.json"}


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tiny_folder, tmp_path, monkeypatch):
    """A setting that is done is not done again, the base's or the trained one's."""
    more = "--steps 1 --eval-settings hard_sample soft_sample hard_greedy".split()
    evaluated, real, breaks = [], softcot.evaluate, {2: "the base's second", 8: "the trained one's"}

    def fragile(policy, problems, setting, config, n, **more):
        evaluated.append(setting)
        if config.out_dir.endswith("cut") and len(evaluated) in breaks:
            breaks.pop(len(evaluated))
            raise KeyboardInterrupt
        return real(policy, problems, setting, config, n, **more)

    monkeypatch.setattr(softcot, "evaluate", fragile)
    for again in ((), ("--resume",)):
        with pytest.raises(KeyboardInterrupt):
            tiny_run(tiny_folder, tmp_path / "cut", *more, *again)
    assert tiny_run(tiny_folder, tmp_path / "cut", *more, "--resume") == 0
    cut, evaluated[:] = len(evaluated), []
    assert tiny_run(tiny_folder, tmp_path / "whole", *more) == 0
    assert cut == len(evaluated) + 2  # the two that broke off
    whole, cut = (read_json(tmp_path / name / "eval.json") for name in ("whole", "cut"))
    assert whole == cut and len(cut) == 6
    assert whole[0]["weights"] != whole[-1]["weights"]


def test_evaluation_figures_equal_a_plain_recount(tiny_folder, monkeypatch):
    """Rollouts are recorded on the way, and every figure is computed again from them, row by row."""
    arguments = f"--model {tiny_folder} --eval-max-cot 9 --samples 4 --prompts 2 --device cpu".split()
    config = softcot.filled(softcot.parse(arguments))
    policy = softcot.load_policy(config, str(tiny_folder))
    problems = softcot.load_problems(config, "toy", "test")[:6]
    kept, real = [], softcot.rollout
    monkeypatch.setattr(softcot, "rollout", lambda *a: kept.append(real(*a)) or kept[-1])
    verdicts = itertools.cycle([100.0, 10.0, 10.0, 100.0, 0.0])
    monkeypatch.setattr(softcot, "reward", lambda *a: next(verdicts))
    scores = softcot.evaluate(policy, problems, SETTINGS["hard_sample"], config, n=4)

    verdicts = itertools.cycle([100.0, 10.0, 10.0, 100.0, 0.0])
    right = np.array([[next(verdicts) == 100 for _ in range(4)] for _ in range(6)])
    pass_1, pass_4 = right.mean(1), right.any(1)
    assert scores["k"]["1"] == pytest.approx(pass_1.mean())
    assert scores["k"]["4"] == pytest.approx(pass_4.mean())
    assert scores["k_error"]["1"] == pytest.approx(pass_1.std(ddof=1) / 6**0.5)
    by_position = {}
    for r in kept:
        for n in range(len(r.cots)):
            for t in range(r.cot.mask[n].sum()):
                by_position.setdefault(t, []).append(r.cot.entropy[n, t].item())
    expected = [np.mean(by_position[t]) for t in range(len(by_position))]
    np.testing.assert_allclose(scores["entropy_by_position"], expected, atol=1e-4)
    everything = [h for values in by_position.values() for h in values]
    assert scores["cot_entropy"] == pytest.approx(np.mean(everything), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_likelihood_of_choices_equals_a_plain_loop(kind):
    policy = tiny_policy(kind)
    rows = [
        {"ctx": "He sat", "endings": ["down", "on a long bench", "up"], "label": "1"},
        {"ctx": "What a fine, long question: she", "endings": ["ran", "x"], "label": "0"},
    ]
    right, nll = [], []
    for row in rows:
        losses = []
        for ending in row["endings"]:
            first = policy.tokenizer(row["ctx"]).input_ids
            both = torch.tensor([first + policy.tokenizer(" " + ending).input_ids])
            logits = policy.model(both).logits[0]
            target = both[0, len(first) :]
            losses.append(nn.functional.cross_entropy(logits[len(first) - 1 : -1], target).item())
        right.append(losses[int(row["label"])] == min(losses))
        nll.append(losses[int(row["label"])])
    scores = choices.evaluate_choices(policy, "hellaswag", rows)
    assert scores["nll"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert scores["accuracy"] == np.mean(right) and scores["problems"] == 2
    assert scores["error"]["nll"] == pytest.approx(np.std(nll, ddof=1) / 2**0.5, rel=1e-3)


def test_choices_are_read_from_the_rows_of_every_data_set():
    arc = {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    assert choices.CHOICES["arc"][2](arc) == ("Question: Q\nAnswer:", [" a", " b"], 1)
    mmlu = {"question": "Q", "choices": ["a", "b", "c", "d"], "answer": 3}
    assert choices.CHOICES["mmlu"][2](mmlu)[1:] == ([" a", " b", " c", " d"], 3)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        softcot.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(softcot.Config):
        assert softcot.flag(field.name) in text and field.metadata["help"].split()[0] in text


def test_the_default_command_learns_to_think_longer_and_leaves_an_ordinary_model(default_run):
    """The whole program as a user starts it, with fewer problems and settings to save time."""
    done, out = default_run
    last = done.stdout.strip().splitlines()[-1]
    assert "toy hard_greedy pass@1" in last and "runs/toy-soft-s0" in last
    assert "--tau 0.5 --sigma-scale 0.33" in done.stdout

    scores = {(r["setting"], r["stage"]): r for r in read_json(out / "eval.json")}
    before, after = scores["hard_greedy", "base"], scores["hard_greedy", "trained"]
    assert after["k"]["1"] >= before["k"]["1"] + 0.30
    assert after["cot_len"] > before["cot_len"] + 1.0
    assert scores["soft_sample", "trained"]["k"].keys() == {"1", "2", "4"}
    rows = read_lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 101))
    wanted = "reward success mixed_groups cot_len stop_rate cot_entropy loss grad_norm lr".split()
    assert all(math.isfinite(row[key]) for row in rows for key in (*wanted, *TIMES))
    assert max(row["logp_gap"] for row in rows) < 0.01
    for name in ("config.json", "samples.jsonl", "curves.png", "state.pt"):
        assert (out / name).stat().st_size > 100

    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    right = 0
    for row in toy_tasks.rows("toy", "test")[:40]:
        ids = tokenizer(row["question"], return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=16)
        text = tokenizer.decode(new[0], skip_special_tokens=True)
        right += text.endswith(f"The final answer is: \\boxed{{{row['answer']}}}")
    assert right / 40 > before["k"]["1"]


def test_a_base_that_was_evaluated_in_two_ways_is_in_two_rows(tmp_path):
    """Fuzzy training of the toy changes tau, and its base is evaluated with that; the order tells nothing."""
    for cot, tau, score in (("soft", 0.5, 0.3), ("fuzzy", 0.1, 0.2)):
        folder = tmp_path / cot
        folder.mkdir()
        config = {"model": None, "task": "toy", "cot": cot, "seed": 0, "tau": tau, "sigma_scale": 0.33}
        row = {"stage": "base", "task": "toy", "setting": "fuzzy_sample", "n": 1, "k": {"1": score}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "eval.json").write_text(json.dumps([row]))
    runs = [str(tmp_path / cot) for cot in ("soft", "fuzzy")]
    tables = [sorted(show.report(order).splitlines()) for order in (runs, runs[::-1])]
    assert tables[0] == tables[1]
    rows = [[c.strip() for c in line.split("|")[6:8]] for line in tables[0] if "fuzzy_sample" in line]
    assert sorted(rows) == [["", "30.00"], ["--tau 0.1", "20.00"]]


def test_the_report_has_mean_and_deviation_over_seeds_and_the_figure_of_the_paper(
    tmp_path, capsysbinary
):
    def run_folder(name, model, cot, seed, base, trained, nll):
        folder = tmp_path / name
        folder.mkdir()
        config = {"model": model, "task": "gsm8k", "cot": cot, "seed": seed, "sigma_scale": None}
        config["eval_tasks"] = ["math500"]
        (folder / "config.json").write_text(json.dumps(config))
        rows = [
            {"stage": stage, "task": "gsm8k", "setting": "hard_greedy", "n": 1, "k": {"1": score}}
            for stage, score in (("base", base), ("trained", trained))
        ]
        many = {"n": 32, "k": {"1": 0.25, "2": 0.5, "32": 0.75}}
        many["k_error"] = dict.fromkeys(many["k"], 0.1)
        rows += [{"stage": "trained", "task": "math500", "setting": "hard_sample", **many}]
        scores = {"accuracy": 0.5, "nll": nll}
        rows += [{"stage": "base", "task": "arc", "setting": "teacher_forced", **scores}]
        (folder / "eval.json").write_text(json.dumps(rows))
        return str(folder)

    llama = "somewhere/Llama-3.2-3B-Instruct"
    runs = [run_folder(f"soft{s}", llama, "soft", s, 0.7, 0.8 + s / 100, 2.0) for s in (0, 1)]
    runs += [run_folder("hard0", llama, "hard", 0, 0.7, 0.6, 2.0)]
    command = [HERE / "results" / "show.py"]
    done = Fork([*command, *runs], PYTHONIOENCODING="ascii").end()
    assert done.returncode == 0, done.stderr
    cells = [[c.strip() for c in line.split("|")[3:-1]] for line in done.stdout.splitlines()]
    sd = np.std([80, 81], ddof=1)
    base, hard, soft = "70.00 ± 0.00 (2) [paper 71.4]", "60.00 [paper 75.9]", f"80.50 ± {sd:.2f} (2)"
    greedy = ["gsm8k", "hard_greedy", "pass@1", "", base, hard, "- [paper 76.7]", soft + " [paper 77.2]"]
    assert cells[2] == greedy
    many = [row for row in cells if row[1:3] == ["hard_sample", "pass@32"]]
    assert many[0][4:] == [
        "- [paper 82.0]", "75.00 [paper 72.4]", "- [paper 83.2]", "75.00 ± 0.00 (2) [paper 84.8]"
    ]  # fmt: skip
    assert ["arc", "teacher_forced", "NLL", "", "2.00 ± 0.00 (2)", "-", "-", "-"] in cells
    config = read_json(tmp_path / "soft1" / "config.json") | {"sigma_scale": 1.0}
    (tmp_path / "soft1" / "config.json").write_text(json.dumps(config))  # not the same run any more
    assert show.main(runs) == 0
    printed = capsysbinary.readouterr().out.decode()
    values = [line.split("|")[6:11:4] for line in printed.splitlines() if "gsm8k | hard_greedy" in line]
    found = [[cell.strip().partition(" [")[0] for cell in row] for row in values]
    assert found == [["", "-"], ["--sigma-scale None", "80.00"], ["--sigma-scale 1.0", "81.00"]]
    assert not any("pass@2" in row for row in cells)
    failed = Fork([*command, tmp_path / "none"]).end()
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "config.json" in failed.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_shadow_of_a_soft_cot_says_what_it_is_made_of_where_it_was_undecided(kind):
    policy = tiny_policy(kind)
    r = sample(policy, Setting("soft", 0.1, 0.33))
    embed, decided = policy.model.get_input_embeddings(), set()
    for n in range(6):
        words = softcot.shadow(policy, r, n)
        T = int(r.cot.mask[n].sum())
        assert len(words) == T
        ids = policy.tokenizer(PROMPTS[n // 2], return_tensors="pt").input_ids
        x = torch.cat([embed(ids), r.cot.x[n : n + 1, :T]], 1).detach()
        logits = policy.model(inputs_embeds=x).logits[0, ids.shape[1] - 1 : -1].detach().double()
        for t, (word, p) in enumerate(zip(words, torch.softmax(logits / 0.1, -1))):
            first, second = p.argsort(descending=True)[:2].tolist()
            assert first == r.cot.ids[n, t]
            decided.add(isinstance(word, str))
            found = [word] if isinstance(word, str) else word[::2]
            expected = policy.tokenizer.convert_ids_to_tokens([first, second])
            assert found == expected[: len(found)] and isinstance(word, str) == (p[first] >= 0.9)
            if not isinstance(word, str):
                assert word[1::2] == pytest.approx(p[[first, second]].tolist(), abs=0.0051)
    assert decided == {True, False}


def test_shadows_are_written_as_they_were_before_the_weights_changed(tiny_folder, tmp_path):
    tiny_run(tiny_folder, tmp_path / "soft", "--steps", "1", "--seed", "3")
    config = softcot.Config(**read_json(tmp_path / "soft" / "config.json"))
    policy = softcot.load_policy(config, str(tiny_folder))
    batch = softcot.prompts_of_step(softcot.load_data(policy, config)[0], 0, 2, 3)
    how = (SETTINGS["soft_sample"], config.max_cot, config.max_answer, 1.0)
    r, _ = softcot.rewarded(policy, batch, 4, (3, 0, 0), *how)
    rows = read_lines(tmp_path / "soft" / "samples.jsonl")
    assert [row["shadow"] for row in rows] == [softcot.shadow(policy, r, n) for n in range(3)]
    assert any(isinstance(word, list) for row in rows for word in row["shadow"])
    tiny_run(tiny_folder, tmp_path / "hard", "--steps", "1", "--cot", "hard")
    rows = read_lines(tmp_path / "hard" / "samples.jsonl")
    assert len(rows) == 3 and not any("shadow" in row for row in rows)


def test_cots_of_three_steps_are_printed_side_by_side(tmp_path, capsysbinary):
    def printed(*arguments):
        assert show.main([str(tmp_path), *arguments]) == 0
        return capsysbinary.readouterr().out.decode()

    config = {"model": None, "task": "toy", "cot": "soft", "seed": 0, "eval_tasks": ["toy"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "eval.json").write_text("[]")
    table = printed()
    assert table.count("\n") == 2  # no CoTs: the table alone
    row = {"prompt": "1+2=", "cot": "3 é 4 ", "stopped": True, "answer": "4}", "gold": "3", "reward": 10.0}
    undecided = ["3 ", ["7", 0.55, "\n", 0.4], "is", [" é ", 0.5, "<eos>", 0.05], "that"]
    lines = [{"step": step, **row} for step in (1, 5, 10, 15, 20) for _ in range(2)]
    lines[0] |= {"shadow": undecided, "prompt": 300 * "a" + "?"}
    lines[-1] |= {"shadow": ["much "] * 20, "stopped": False, "answer": "4", "reward": 0.0}
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2'
    (tmp_path / "samples.jsonl").write_text(text)  # as of a run that is being written
    found = printed()
    assert found.startswith(table) and "likeliest" in found
    shown = [[part.strip() for part in (line[:41], line[41:82], line[82:])] for line in found.splitlines()]
    start = shown.index(["step 1", "step 10", "step 20"])
    assert shown[start - 1] == ["", "", ""] and shown[start + 1][1:] == ["1+2=", "1+2="]
    assert "?" in "".join(part[0] for part in shown[start:start + 9])  # the end of a long question
    assert "3 [7|'\\n' .55/.40]is [é|<eos> .50/.05] that" in " ".join(part[0] for part in shown)
    assert "much much (did not stop) \\boxed{4   reward 0" in " ".join(part[2] for part in shown)
    assert max(map(len, found.splitlines()[start:])) <= 120
    assert "step 1 " not in printed("--steps", "4", "19") and "step 5  " in printed("--steps", "4", "19")
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps({"step": 1, **row}) + "\n" for _ in "ab"))
    older = printed()  # the records of hard CoTs and of older versions have no shadows
    assert "likeliest" not in older and "3 é 4\n\\boxed{4}   reward 10\n" in older


def test_the_bench_prints_each_mode_beside_generate_and_changes_no_weight(
    tiny_folder, tmp_path, capsys, monkeypatch
):
    policies = []

    def load_policy(*arguments, real=softcot.load_policy):
        policies.append(real(*arguments))
        return policies[0]

    monkeypatch.setattr(softcot, "load_policy", load_policy)
    bench.main(f"--model {tiny_folder} --prompts 2 --samples 2 --out-dir {tmp_path}".split())
    for name, weight in load_file(tiny_folder / "model.safetensors").items():
        assert (policies[0].model.state_dict()[name] - weight).abs().max() < 1e-9
    *lines, memory = capsys.readouterr().out.splitlines()[-6:]
    assert [line.split()[0] for line in lines] == ["tokens_per_s", "hard", "soft", "fuzzy", "generate()"]
    assert 0.1 < float(memory.removeprefix("highest memory: ").removesuffix(" GiB")) < 20
    for line, columns in zip(lines[1:], (4, 4, 4, 2)):
        numbers = [float(x) for x in line.split()[1:]]
        assert len(numbers) == columns and min(numbers) >= 0 and numbers[0] > 0
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("signal, noise, N", [(1.0, 3.0, 64), (0.3, 1.0, 512)])
def test_n0_of_gradients_with_known_signal_and_noise(signal, noise, N):
    """The mean of batches has noise / sqrt(N): n0 = noise^2 / signal^2, whatever N."""
    generator = torch.Generator().manual_seed(0)
    inside, M = 0, 200
    mean = signal * torch.ones(M, dtype=torch.float64)
    for _ in range(100):
        eps = torch.randn(40, M, generator=generator, dtype=torch.float64)
        found = snr.n0(mean + noise * N**-0.5 * eps, N)
        inside += found["low"] < (noise / signal) ** 2 < found["high"]
        assert 0.5 < found["n0"] / (noise / signal) ** 2 < 2
    assert 55 <= inside <= 82  # one standard error: 68 of 100


def test_n0_of_pure_noise_is_without_an_upper_end():
    generator = torch.Generator().manual_seed(0)
    found = [snr.n0(torch.randn(30, 500, generator=generator), 64) for _ in range(50)]
    assert sum(math.isinf(x["high"]) for x in found) > 35
    assert min(x["low"] for x in found) > 500  # N / n0 is 0 +- 0.002


def test_gradients_of_cot_and_answers_add_up_to_that_of_a_step():
    policy = tiny_policy("llama")
    r = sample(policy, SETTINGS["soft_sample"])
    advantages = torch.linspace(-1, 1, len(r.cots))
    every = snr.Sketch(policy, 10**9)
    softcot.policy_gradient(policy, r, advantages)
    whole = [0 * w if w.grad is None else w.grad.clone() for w in policy.model.parameters()]
    both = every.take()
    assert both.norm().item() == pytest.approx(torch.cat([g.flatten() for g in whole]).norm().item())
    found = snr.gradients(policy, r, advantages, every)
    close = dict(rtol=0, atol=1e-5 * both.abs().max().item())
    torch.testing.assert_close(found["cot"] + found["answer"], both, **close)


def test_products_of_sketches_are_those_of_gradients_on_average():
    """Also where a few coordinates hold most of a gradient."""
    model = nn.Module()
    model.a, model.b, model.c = (nn.Parameter(torch.zeros(n)) for n in (700, 4000, 3))
    policy, generator = types.SimpleNamespace(model=model), torch.Generator().manual_seed(0)
    sketch, errors = snr.Sketch(policy, 1000), []
    for _ in range(40):
        pair = [torch.randn(4703, generator=generator) ** 3 for _ in range(2)]
        pair[1] += 0.5 * pair[0]
        sketches = []
        for g in pair:
            model.a.grad, model.b.grad, model.c.grad = (part.clone() for part in g.split([700, 4000, 3]))
            sketches.append(sketch.take())
        scale = pair[0].norm() * pair[1].norm()
        errors.append(((sketches[0] @ sketches[1] - pair[0] @ pair[1]) / scale).item())
    assert abs(np.mean(errors)) < 3 / (40 * 1000) ** 0.5 and np.std(errors) < 1.5 / 1000**0.5


def test_the_instrument_finds_more_signal_in_hard_tokens_than_in_soft_ones(
    classroom, tmp_path, capsys, monkeypatch
):
    """On the toy, whose n0 is 230 with hard tokens and 20,000 with soft ones."""
    monkeypatch.chdir(classroom)
    flags = "--prompts 16 --minutes 0.01 --sketch 20000 --device cpu".split()
    snr.main([*flags, "--out", str(tmp_path / "record"), "--seed", "1"])
    record = json.loads((tmp_path / "record").read_text())
    n0 = {(row["mode"], row["of"]): row for row in record["n0"]}
    assert n0["hard", "cot"]["K"] == 3 and 50 < n0["hard", "cot"]["n0"] < 1500
    assert (n0["soft 0.33", "cot"]["n0"] or math.inf) > 1500  # null: no signal was found
    assert f"--sigma-scale {record['recommended']:g}" in capsys.readouterr().out
    mixed = {row["mode"]: row["mixed"] for row in record["base"]}
    assert mixed["soft 0"] < mixed[f"soft {record['recommended']:g}"]


def test_runs_of_a_real_model_stop_with_the_clock_and_go_on(classroom, tmp_path, monkeypatch, capsys):
    """Rehearsal with the toy: what was cut off and gone on with is what one long run finds."""
    monkeypatch.chdir(classroom)
    monkeypatch.setattr(real_model, "CHECKS", (0, 2))
    flags = "--prompts 4 --samples 8 --steps 3 --questions 64 --problems 8 --eval-samples 2"
    flags = [*flags.split(), *"--choices 4 --noise 0.33 --device cpu --runs soft hard answers".split()]
    real_model.main([str(tmp_path / "once"), *flags])
    asked = itertools.count()

    def need(clock, seconds):
        if next(asked) % 3 == 2:
            raise real_model.OutOfTime

    monkeypatch.setattr(real_model.Clock, "need", need)
    capsys.readouterr()
    for _ in range(20):
        real_model.main([str(tmp_path / "pieces"), *flags])
        if "goes on" not in capsys.readouterr().out:
            break
    assert next(asked) > 9  # times out of 3: it was cut off again and again
    once, pieces = (tmp_path / name for name in ("once", "pieces"))
    assert (once / "records.jsonl").read_text() == (pieces / "records.jsonl").read_text()
    steps = [(row["run"], row["step"]) for row in read_lines(once / "records.jsonl")]
    assert steps == [(run, step) for run in ("soft", "hard", "answers") for step in (0, 2, 3)]
    for file in once.glob("*-s0-lr5e-05.jsonl"):
        ours, theirs = (read_lines(folder / file.name) for folder in (once, pieces))
        assert [row["loss"] for row in ours] == [row["loss"] for row in theirs] and len(ours) == 3
    rows = {(row["run"], row["step"]): row for row in read_lines(once / "records.jsonl")}
    assert rows["soft", 0]["kl"] < 1e-9 < rows["soft", 3]["kl"]
    assert not list(pieces.glob("*.pt"))
    capsys.readouterr()
    real_model.main([str(once), "--report"])
    assert "| answers | 0 | 5e-05 | 3 |" in capsys.readouterr().out
    assert (once / "report.png").stat().st_size > 10000


def test_the_score_that_is_left_out_of_a_control_gives_no_gradient():
    policy = tiny_policy("llama")
    r = sample(policy, SETTINGS["soft_sample"])
    advantages, every = torch.linspace(-1, 1, len(r.cots)), snr.Sketch(policy, 10**9)
    apart = snr.gradients(policy, r, advantages, every)
    for which, part in (("cot", "cot"), ("answers", "answer")):
        with real_model.score_of(which):
            softcot.policy_gradient(policy, r, advantages)
        close = dict(rtol=0, atol=1e-5 * apart[part].abs().max().item())
        torch.testing.assert_close(every.take(), apart[part], **close)


def test_the_distance_from_the_base_is_that_of_the_solutions_tokens():
    """KL of the next token, by a loop over positions; nothing of the prompts' own tokens counts."""
    base, other = tiny_policy("llama"), tiny_policy("llama")
    with torch.no_grad():
        for w in other.model.parameters():
            w += 0.1 * torch.randn_like(w)
    texts, terms = [("1+2=", "3 7 "), ("4+4+4+4=", "8")], []
    for prompt, solution in texts:
        ids = base.tokenizer(prompt + solution, return_tensors="pt").input_ids
        p, q = (torch.log_softmax(m.model(ids).logits[0].double(), -1) for m in (base, other))
        for i in range(len(base.tokenizer(prompt).input_ids), ids.shape[1]):
            terms.append((p[i - 1].exp() * (p[i - 1] - q[i - 1])).sum().item())
    found = real_model.distance(base, other, texts)
    assert found == pytest.approx(np.mean(terms), rel=1e-4) and found > 0.01
    assert real_model.distance(base, base, texts) == 0


def test_runs_of_other_sizes_in_one_folder_stay_apart(classroom, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(classroom)
    monkeypatch.setattr(real_model, "CHECKS", (0,))
    flags = "--samples 4 --questions 32 --problems 4 --eval-samples 2 --choices 0 --noise 0.33 --runs soft".split()
    for more in ("--prompts 2 --steps 1", "--prompts 2 --steps 2", "--prompts 3 --steps 1"):
        real_model.main([str(tmp_path), *flags, *more.split()])
    lengths = [len(read_lines(file)) for file in sorted(tmp_path.glob("soft-*.jsonl"))]
    assert sorted(lengths) == [1, 1, 2]
    capsys.readouterr()
    real_model.main([str(tmp_path), "--report"])
    table = capsys.readouterr().out.rpartition("\n\n")[2]
    assert [line.split(" | ")[2] for line in table.splitlines()[3:]] == ["2 x 4", "2 x 4", "3 x 4"]


def test_shuffled_rewards_are_those_of_another_prompt():
    rewards = torch.tensor([[100.0, 10.0, 0.0, 10.0], [0.0, 0.0, 100.0, 10.0]])
    with real_model.score_of("shuffled"):
        found = softcot.rloo_advantages(rewards)
    torch.testing.assert_close(found, softcot.rloo_advantages(rewards)[[1, 0]])


def test_gradients_that_are_clipped_apart_have_each_the_norm_1():
    policy = tiny_policy("llama")
    r = sample(policy, SETTINGS["soft_sample"])
    advantages, every = torch.linspace(-1, 1, len(r.cots)), snr.Sketch(policy, 10**9)
    found = snr.gradients(policy, r, advantages, every)
    expected = sum(g / g.norm() for g in found.values())
    assert min(g.norm() for g in found.values()) > 1
    with real_model.score_of("apart"):
        softcot.policy_gradient(policy, r, advantages)
    close = dict(rtol=0, atol=1e-4 * expected.abs().max().item())
    torch.testing.assert_close(every.take(), expected, **close)


def test_the_rule_of_the_window_is_counted_on_runs_that_did_not_make_it(tmp_path, monkeypatch, capsys):
    """Two runs made the rule, two did not; it is wrong in one of the latter."""
    row = dict(width=64, base_without=0.4, mixed=0.5, first=0.1, last=0.9, greedy_base=0.4, grad_norm=1)
    rows = [row | dict(seed=0, factor=0.1, base_with=0.2, greedy=0.9),
            row | dict(seed=0, factor=1.33, base_with=0.001, greedy=0.4),
            row | dict(seed=1, factor=0.1, base_with=0.39, greedy=0.9),
            row | dict(seed=0, factor=0.5, base_with=0.2, greedy=0.8)]  # fmt: skip
    (tmp_path / "window.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(window, "RECORDS", tmp_path / "window.jsonl")
    window.main(["--draw"])
    printed = capsys.readouterr().out
    assert "2 of 2 runs like" in printed and "1 of 2 runs others" in printed and "(64, 0.1, 1)" in printed
    assert (tmp_path / "window.png").stat().st_size > 10000


def test_a_pretrained_model_is_taught_to_add_with_the_toys_habit(tied_folder, tmp_path, monkeypatch):
    """Replies are running totals that break off as often as the toy's; a tiny model learns from them."""
    rng, seen = random.Random(1), {True: [], False: []}
    for terms in toy_tasks.all_sums("toy")[:3000].tolist():
        question, reply = real_sums.text(terms, rng)
        thought, _, box = reply.partition(" The final answer is: \\boxed{")
        given, totals = list(map(int, thought.split())), list(itertools.accumulate(terms))[1:]
        assert question == "+".join(map(str, terms)) + "=" and box == f"{given[-1]}}}"
        assert given == totals[: len(given)]
        for i, total in enumerate(totals[:-1][: len(given)], 1):
            seen[total % 5 == 0].append(i == len(given))
    for round_number, chance in zip((True, False), toy_tasks.STOP["toy"]):
        stops = seen[round_number]
        assert abs(np.mean(stops) - chance) < 4 * (chance * (1 - chance) / len(stops)) ** 0.5

    @torch.no_grad()
    def loss(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rng, losses = random.Random(2), []
        for terms in toy_tasks.all_sums("toy")[:32].tolist():
            ids = tokenizer("".join(real_sums.text(terms, rng)), return_tensors="pt").input_ids
            losses.append(model(ids, labels=ids).loss.item())
        return np.mean(losses)

    for name, value in dict(STEPS=30, BATCH=8, LR=0.02).items():
        monkeypatch.setattr(real_sums, name, value)
    real_sums.main(str(tied_folder), str(tmp_path / "taught"))
    assert loss(tmp_path / "taught") < loss(tied_folder) - 1.0
    asked = {tuple(terms) for terms in toy_tasks.all_sums("toy")[: toy_tasks.TEST].tolist()}
    assert asked.isdisjoint(map(tuple, toy_tasks.pool("toy").tolist()))


def test_a_model_that_is_not_there_leaves_the_files_of_a_run_alone(tmp_path):
    files = {"metrics.jsonl": "a", "state.pt": "b", "config.json": "{}", "eval.json": "[]"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    arguments = f"--prompts 2 --samples 2 --out-dir {tmp_path} --model ".split()
    assert softcot.main([*arguments, str(tmp_path / "nothing")]) == 2
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("task", softcot.TASKS)
def test_every_task_is_evaluated_unless_told_otherwise(task):
    train = [] if softcot.TASKS[task].train else ["--eval-only"]
    config = softcot.filled(softcot.parse(["--task", task, "--model", "any", *train]))
    assert config.eval_limit == 128 and config.eval_k == 32


def test_rounding_by_chance_is_right_on_average_and_exact_where_it_can_be():
    torch.manual_seed(0)
    x = torch.tensor([1.0, -1.5, 0.0, 1 + 2**-9, -(1 + 2**-10), 3e-5, 1e30])
    rounded = torch.stack([softcot.round_by_chance(x) for _ in range(20_000)])
    assert rounded.dtype == torch.bfloat16
    assert (rounded[:, :3].float() == x[:3]).all()
    step = torch.tensor([2**-7, 2**-7])  # of bf16 just above 1
    error = (rounded[:, 3:5].double().mean(0) - x[3:5].double()).abs()
    assert (error < 4 * 0.5 * step / 20_000**0.5).all()
    assert set(rounded[:, 3].tolist()) == {1.0, 1 + 2**-7}
    relative = rounded[:, 5:].double().mean(0) / x[5:].double() - 1
    assert (relative.abs() < 4 * 2**-8 / 20_000**0.5).all()


def test_bf16_weights_move_at_a_small_learning_rate_and_by_the_right_mean():
    def moved(kind, dtype):
        torch.manual_seed(0)
        w = nn.Parameter(torch.full((200_000,), 0.013).to(dtype))
        optimizer = kind([w], lr=3e-6, betas=softcot.BETAS, weight_decay=0.0)
        moments = {name: torch.zeros_like(w) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[w] = {"step": torch.tensor(0.0), **moments}
        start = w.detach().clone()
        for _ in range(3):
            w.grad = torch.full_like(w, 2.0)
            optimizer.step()
        assert all(v.dtype == dtype for k, v in optimizer.state[w].items() if k != "step")
        return (w.detach().double() - start.double())

    exact = moved(torch.optim.AdamW, torch.float32)
    nearest = moved(torch.optim.AdamW, torch.bfloat16)
    by_chance = moved(softcot.AdamW16, torch.bfloat16)
    assert exact.mean().item() == pytest.approx(-9e-6, rel=1e-3)
    assert (nearest == 0).all()  # what AdamW16 is for
    assert 0.05 < (by_chance != 0).double().mean() < 0.5
    assert by_chance.mean().item() == pytest.approx(exact.mean().item(), rel=0.05)


def test_chunks_of_a_bf16_weight_are_updated_as_the_whole(monkeypatch):
    monkeypatch.setattr(softcot, "round_by_chance", lambda x: x.bfloat16())  # no random numbers
    found = []
    for chunk in (7, 10**6):
        monkeypatch.setattr(softcot, "CHUNK", chunk)
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(10, 5).bfloat16())
        optimizer = softcot.AdamW16([w], lr=1e-2, betas=softcot.BETAS)
        moments = {name: torch.zeros_like(w) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[w] = {"step": torch.tensor(0.0), **moments}
        for _ in range(3):
            w.grad = torch.randn(10, 5).bfloat16()
            optimizer.step()
        assert optimizer.state[w]["step"] == 3
        found.append([w.detach(), *optimizer.state[w].values()])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and found[0][0].std() > 0


def test_a_bf16_run_trains_and_is_resumed_to_the_bit(tiny_folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ("--dtype", "bf16", "--steps", "4")
    assert tiny_run(tiny_folder, whole, *arguments) == 0

    with pytest.MonkeyPatch.context() as patch:
        break_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            tiny_run(tiny_folder, cut, *arguments)
    assert tiny_run(tiny_folder, cut, *arguments, "--resume") == 0
    ours, theirs = (torch.load(f / "state.pt", weights_only=True)["model"] for f in (whole, cut))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(value.dtype == torch.bfloat16 for value in ours.values())
    assert any((base[key].bfloat16() != ours[key]).any() for key in ours)


def choice_rows(folder, count):
    """Questions in the form of HellaSwag, in folder/hellaswag."""
    rows = [{"ctx": f"{i}+1=", "endings": ["2", "3", "1+1"], "label": "1"} for i in range(count)]
    (folder / "hellaswag").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "hellaswag" / "validation.jsonl").write_text(lines)
    return rows


def test_choices_are_evaluated_from_the_command_line(tiny_folder, tmp_path, capsys):
    rows, out = choice_rows(tmp_path, 5), tmp_path / "run"
    few = ("--steps", "2", "--lr", "0.1", "--eval-settings", "hard_greedy")
    assert tiny_run(tiny_folder, out, *few) == 0
    before = read_json(out / "eval.json")
    command = [str(out), "hellaswag", "--data-dir", str(tmp_path), "--limit"]
    assert choices.main([*command, "5"]) == 0
    capsys.readouterr()
    assert choices.main([*command, "4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    *others, base, trained = read_json(out / "eval.json")
    assert others == before  # and none is there twice
    config = softcot.filled(softcot.Config(model=str(tiny_folder)))
    for record, stage, folder in ((base, "base", tiny_folder), (trained, "trained", out / "model")):
        policy = softcot.load_policy(config, str(folder))
        scores = choices.evaluate_choices(policy, "hellaswag", rows[:4])
        key = {"stage": stage, "task": "hellaswag", "setting": "teacher_forced"}
        assert record == {**key, "model": str(tiny_folder), **scores} and scores["problems"] == 4
        line = [line for line in printed if line.startswith(stage)][0]
        assert f"{scores['accuracy']:.3f}" in line and f"{scores['nll']:.3f}" in line
    assert base["nll"] != trained["nll"] and len(printed) == 2
    assert choices.main([str(out), "toy-walk", "--limit", "2"]) == 0
    tasks = [(row["stage"], row["task"]) for row in read_json(out / "eval.json")[-4:]]
    assert tasks == [(s, task) for task in ("hellaswag", "toy-walk") for s in ("base", "trained")]


@pytest.mark.parametrize(
    "words, says",
    [
        ("RUN chess", "chess"),
        ("RUN hellaswag --data-dir no", "no/hellaswag/validation.jsonl"),
        ("RUN hellaswag", "row 2 can't be read"),
        ("RUN mmlu", "mmlu/test.jsonl"),
        ("RUN toy-walk --limit 0", "--limit 0"),
        ("RUN toy-walk --device cuda:9", "--device cuda:9"),
        ("RUN toy-walk --colour red", "--colour"),
        ("RUN", "task"),
        ("no toy-walk", "no holds no run"),
        ("RUN/model toy-walk", "no trained model"),
    ],
)
def test_a_mistake_of_who_asks_for_choices_is_one_line(words, says, tiny_folder, tmp_path, capsys):
    choice_rows(tmp_path, 1)
    with open(tmp_path / "hellaswag" / "validation.jsonl", "a") as file:
        file.write('{"ctx": "He", "endings": ["sat", "ran"], "label": ""}\n')  # as HellaSwag's test
    run = tmp_path / "run"
    shutil.copytree(tiny_folder, run / "model")
    config = {"model": str(tiny_folder), "data_dir": str(tmp_path), "dtype": "fp32", "device": "cpu"}
    (run / "config.json").write_text(json.dumps(config))
    assert choices.main(words.replace("RUN", str(run)).split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("choices.py: error: ") and says in lines[0], lines
    assert not (run / "eval.json").exists()


def test_a_signal_ends_an_evaluation(tiny_folder, tmp_path, capsys, monkeypatch):
    calls = []

    def noted(*arguments, real=softcot.rollout):
        calls.append(softcot.note_signal(signal.SIGTERM, None))
        return real(*arguments)

    monkeypatch.setattr(softcot, "rollout", noted)
    monkeypatch.setattr(softcot, "SIGNALS", [])
    assert tiny_run(tiny_folder, tmp_path / "out", "--eval-only") == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.startswith("Stopped. To go on: python softcot.py") and command.endswith("--resume")
    assert len(calls) == 1  # and its batch, which is all of this setting, is not lost
    assert len(read_json(tmp_path / "out" / "eval.json")) == 1
    monkeypatch.setattr(softcot, "SIGNALS", [])
    assert softcot.main(shlex.split(command)[6:]) == 0
    assert len(calls) == 2  # of the setting that is done, nothing is sampled again


def test_a_second_signal_ends_at_once(monkeypatch):
    monkeypatch.setattr(softcot, "SIGNALS", [])
    softcot.note_signal(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        softcot.note_signal(signal.SIGINT, None)


def test_the_readme_names_the_line_of_every_equation():
    assert subprocess.run([sys.executable, HERE / ".ci" / "equations.py", "--check"]).returncode == 0


def test_the_table_of_claims_follows_from_the_recorded_results(tmp_path):
    for name in ("softcot.py", "toy_tasks.py"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(HERE / "results", tmp_path / "results")
    done = Fork([tmp_path / "results" / "claims.py"]).end()
    assert done.returncode == 0, done.stderr
    assert done.stdout == (HERE / "results" / "claims.md").read_text()


def test_runs_are_packed_into_a_table(tmp_path):
    full, bare = tmp_path / "full", tmp_path / "bare"
    for folder in (full, bare):
        folder.mkdir()
        (folder / "eval.json").write_text('[{"n": 1}]')
    (full / "config.json").write_text('{"seed": 3}')
    lines = ('{"step": 1, "loss": NaN, "lr": 0.1, "train_s": 9}', '{"step": 2, "loss": 0.1234567, "moved": 1}')
    (full / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, str(HERE / "results" / "pack.py"), str(full), str(bare)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    one, two = map(json.loads, table.splitlines())
    assert (one["run"], one["config"], one["eval"]) == ("full", {"seed": 3}, [{"n": 1}])
    assert set(one["metrics"]) == {"step", "loss", "lr", "moved"} and one["metrics"]["lr"] == [0.1, None]
    assert one["metrics"]["moved"] == [None, 1]  # nothing was trained in the first step
    assert one["metrics"]["step"] == [1, 2] and one["metrics"]["loss"][1] == 0.1235
    assert two == {"run": "bare", "config": None, "eval": [{"n": 1}], "metrics": None}


@pytest.fixture(scope="session")
def classroom(tmp_path_factory):
    """A folder of the project with a toy, pretrained half as long; notebooks train the rest there."""
    folder = tmp_path_factory.mktemp("classroom")
    for name in ("softcot.py", "toy_tasks.py"):
        shutil.copy(HERE / name, folder)
    (folder / "notebooks" / "solutions").mkdir(parents=True)
    shutil.copy(HERE / "notebooks" / "checks.py", folder / "notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_tasks, "STEPS", toy_tasks.STEPS // 2)
        place = os.environ.get("TOY", folder / "toy-base")  # of both halves of .ci/run
        base = toy_tasks.base_model(Path(place))
    shutil.copytree(base, folder / "runs" / "toy-base")
    return folder


@pytest.fixture(scope="session")
def default_run(classroom):
    """The default command in the classroom: how it ended, and its folder. The notebooks take it for their soft run."""
    command = ["softcot.py", "--eval-limit", "96", "--eval-k", "4"]
    command += ["--eval-settings", "hard_greedy", "hard_sample", "soft_sample"]
    done = Fork(command, classroom).end()
    assert done.returncode == 0, done.stderr
    out, copy = (classroom / "runs" / name for name in ("toy-soft-s0", "nb-soft"))
    shutil.copytree(out, copy)  # the same training, but without validation: the last model is kept, not the best
    model = transformers.AutoModelForCausalLM.from_pretrained(copy / "model")
    model.load_state_dict(torch.load(copy / "state.pt", weights_only=True)["model"])
    model.save_pretrained(copy / "model")
    return done, out


def test_the_file_alone_in_an_empty_folder_trains_on_a_file_of_ones_own(tiny_folder, tmp_path):
    shutil.copy(HERE / "softcot.py", tmp_path)
    rows = [{"question": f"{i}+{i % 5 + 1}=", "answer": str(i)} for i in range(30)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = "--task mine.jsonl --steps 1 --max-cot 6 --max-answer 3 --eval-settings soft_greedy"
    command = [sys.executable, "softcot.py", *command_of(tiny_folder, "out", *small.split())[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "after 1 steps of soft training" in done.stdout, done.stderr
    assert (tmp_path / "out" / "curves.png").exists()
    done = Fork(["softcot.py", "--help"], tmp_path).end()
    assert done.returncode == 0 and "--sigma-scale" in done.stdout


def test_a_picture_of_pass_at_k_is_drawn_for_each_run(tiny_folder, tmp_path):
    run = tmp_path / "run"
    assert tiny_run(tiny_folder, run, "--steps", "1", "--eval-settings", "soft_sample") == 0
    assert not (run / "pass_at_k.png").exists()
    assert show.main([str(run)]) == 0
    assert (run / "pass_at_k.png").stat().st_size > 5000


class Kernel(Fork):
    """A Jupyter kernel in a fork; jupyter_client takes it for the subprocess.Popen that it would start."""

    stdin = stdout = stderr = None

    def __init__(self, command, cwd, env, **_):
        super().__init__([ipykernel_launcher.__file__, *command[3:]], cwd, self.before, **env)
        os.setpgid(self.pid, self.pid)  # signals go to the whole group

    def before(self):
        """What is left of this process must not be taken for the kernel's own."""
        signal.alarm(0)  # each cell has its limit
        signal.set_wakeup_fd(-1)
        asyncio.set_event_loop(asyncio.new_event_loop())
        matplotlib.use("module://matplotlib_inline.backend_inline")

    def poll(self):
        return self.exitcode

    def wait(self):
        self.join()
        return self.exitcode


SMALLER = r"\1prompts=16, steps=50, lr=1e-4, seed"  # a quarter of the time, and as much is learnt


def execute(notebook, folder, **how):
    """Run all cells of a notebook in a folder; the trainings of notebooks 2 and 3 are smaller."""
    where = {"metadata": {"path": str(folder)}}
    for cell in notebook.cells:
        cell.source = re.sub(r"(softcot\.Config\(\w+=\S+, )seed", SMALLER, cell.source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_provisioner, "launch_kernel", Kernel)
        NotebookClient(notebook, timeout=280, kernel_name="python3", resources=where, **how).execute()


@pytest.mark.parametrize("path", sorted((HERE / "notebooks").glob("[123]_*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_runs_and_its_lessons_hold(path, classroom, default_run):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert path.stat().st_size < 300_000
    assert all(len(cell.source.splitlines()) <= 30 and cell.execution_count for cell in code)
    assert any("assert " in cell.source for cell in code)
    execute(notebook, classroom / "notebooks")


WRITE = "4_write_it_yourself.ipynb"  # the student's; solutions/ has it filled in
SOLVED = nbformat.read(HERE / "notebooks" / "solutions" / WRITE, as_version=4)
BODIES = {  # of each function that a student writes: the solution
    cell.source.split("(")[0].removeprefix("def "): cell.source
    for cell in SOLVED.cells
    if cell.cell_type == "code" and "exercise" in cell.metadata.get("tags", [])
}


def outputs(cell):
    """What a cell has printed."""
    return "".join(o.text for o in cell.outputs if o.get("name") == "stdout")


def checked(name, **sources):
    """What the check of an exercise prints, with these sources in place of the solutions."""
    space = {"torch": torch, "np": np, "math": math}
    for source in (BODIES | sources).values():
        exec(source, space)
    checks.RIGHT.clear()
    checks.RIGHT.update(BODIES)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        getattr(checks, name.removeprefix("my_"))(space[name])
    return said.getvalue().strip()


@pytest.mark.parametrize("folder, said", [("solutions", "right"), (".", "not written yet")])
def test_write_it_yourself_runs_solved_and_with_nothing_filled_in(folder, said, classroom):
    path = HERE / "notebooks" / folder / WRITE
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert path.stat().st_size < 300_000
    assert all(len(cell.source.splitlines()) <= 30 for cell in code)
    assert all(bool(cell.execution_count) == (folder == "solutions") for cell in code)
    stored = [outputs(cell) for cell in code]
    execute(notebook, classroom / "notebooks" / folder)
    found = [outputs(cell) for cell in code]
    at = [i for i, cell in enumerate(code) if cell.source.startswith("checks.")]
    assert len(at) == len(BODIES) == 6
    for i, name in zip(at, BODIES, strict=True):
        assert found[i].startswith(f"{name}: {said}") and found[i].count("\n") == 1
        assert folder == "." or found[i] == stored[i]
    (places,) = [text for text in found if "softcot.next_input" in text]
    assert places.count("takes the place of" if folder == "solutions" else "stays") == 6


def test_the_two_versions_of_write_it_yourself_differ_in_the_exercises_alone():
    cells = [nbformat.read(HERE / "notebooks" / f / WRITE, as_version=4).cells for f in (".", "solutions")]
    for ours, solved in zip(*cells, strict=True):
        assert (ours.cell_type, ours.metadata, ours.id) == (solved.cell_type, solved.metadata, solved.id)
        if "exercise" not in ours.metadata.get("tags", []):
            assert ours.source == solved.source
        elif ours.cell_type == "code":
            head = ours.source.removesuffix("    ...")
            assert head != ours.source and solved.source.startswith(head)


@pytest.mark.parametrize(
    "name, old, new, words",
    [
        ("my_mixture", " / tau", "", "tau is missing"),
        ("my_mixture", "@ E", "@ E.detach()", "its gradient in E: the numbers are right, but no gradient"),
        ("my_step", "logits.argmax(-1)", "logits.argmax().reshape(1) % len(E)", "token, soft, two rows"),
        ("my_mixture", " / tau", " * tau", "multiply by tau"),
        ("my_mixture", "dim=-1", "dim=0", "runs over the rows"),
        ("my_mixture", "torch.softmax(logits / tau, dim=-1)", "logits / tau", "softmax is missing"),
        ("my_mixture", "torch.softmax", "torch.log_softmax", "log_softmax"),
        ("my_mixture", "return p @ E", "return p", "goes on to h = p E"),
        ("my_mixture", "return p @ E", "return E[p.argmax(-1)]", "likeliest token's embedding"),
        ("my_mixture", "torch.softmax(logits / tau, dim=-1)", "torch.exp(logits / tau)", "not divided"),
        ("my_mixture", "p @ E", "(p @ E).detach()", "no gradient passes"),
        ("my_mixture", "    p =", "    logits /= tau\n    tau = 1\n    p =", "changes one of its arguments"),
        ("my_mixture", "torch.softmax(logits / tau, dim=-1)",
         "(logits / tau).exp() / (logits / tau).exp().sum(-1, keepdim=True)", "exp of a large number"),
        ("my_mixture", "return p @ E", "p @ E", "returns nothing"),
        ("my_mixture", "p @ E", "E @ p", "it stops with RuntimeError"),
        ("my_gaussian_logp", "sigma**2)", "sigma**2) - mean.shape[1] / 2 * math.log(2 * math.pi * sigma**2)",
         "has the constant in it"),
        ("my_gaussian_logp", "sigma**2", "sigma", "divide by 2 sigma; "),
        ("my_gaussian_logp", "(2 * sigma**2)", "sigma**2", "1/2 is missing"),
        ("my_gaussian_logp", "2 * sigma**2", "(2 * sigma) ** 2", "only sigma is squared"),
        ("my_gaussian_logp", "sum(-1)", "mean(-1)", "not averaged"),
        ("my_gaussian_logp", "sum(-1)", "sum()", "over the rows, too"),
        ("my_gaussian_logp", ".sum(-1)", "", "a number for each coordinate"),
        ("my_gaussian_logp", "-((", "((", "the sign"),
        ("my_gaussian_logp", "x.detach()", "x", "x moves along with its mean"),
        ("my_gaussian_logp", "- mean)", "- mean.detach())", "no gradient passes"),
        ("my_rloo_advantages", "(rewards.sum(dim=1, keepdim=True) - rewards) / (G - 1)",
         "rewards.mean(dim=1, keepdim=True)", "leave out the sample's own"),
        ("my_rloo_advantages", "(rewards.sum(dim=1, keepdim=True) - rewards) / (G - 1)",
         "rewards.mean()", "over all prompts"),
        ("my_rloo_advantages", "(G - 1)", "G", "they are G - 1"),
        ("my_rloo_advantages", " / (G - 1)", "", "should be their mean"),
        ("my_rloo_advantages", "rewards - others", "others", "subtract it from the reward"),
        ("my_rloo_advantages", "return rewards - others", "return (rewards - rewards.mean(1, keepdim=True))"
         " / rewards.std(1, keepdim=True)", "standard deviation"),
        ("my_pass_at_k", "1 - math.comb(n - c, k) / math.comb(n, k)", "1 - (1 - c / n) ** k", "biased"),
        ("my_pass_at_k", "1 - math", "math", "take 1 less that"),
        ("my_pass_at_k", "n - c, k", "c, k", "count those of wrong ones"),
        ("my_pass_at_k", "1 - math.comb(n - c, k) / math.comb(n, k)", "c / n", "where is k"),
        ("my_sample_token", " / tau", "", "tau is missing"),
        ("my_sample_token", "return before.clamp(max=logits.shape[1] - 1)", "return before + 1", "behind the right"),
        ("my_sample_token", "return before.clamp(max=logits.shape[1] - 1)", "return before - 1", "before the right"),
        ("my_sample_token", ".cumsum(-1)", "", "where the pieces end, cumsum"),
        ("my_sample_token", "u[:, None]", "u[0]", "a u of its own"),
        ("my_sample_token", "tau == 0", "False", "tau = 0: take the likeliest"),
        ("my_sample_token", ".clamp(max=logits.shape[1] - 1)", "", "past the last token"),
        ("my_sample_token", "u[:, None]", "torch.rand(len(u), 1)", "something else at each call"),
        ("my_sample_token", "- 1)", "- 1).float()", "tokens are integers"),
        ("my_step", "sigma * eps", "eps", "not multiplied by sigma"),
        ("my_step", "sigma * eps", "sigma**2 * eps", "multiplied by sigma^2"),
        ("my_step", "        x = x + sigma * eps", "        pass", "the noise is missing"),
        ("my_step", "sigma * eps", "sigma * torch.randn_like(x)", "something else at each call"),
        ("my_step", 'cot == "hard"', 'cot != "soft"', "fuzzy is like soft"),
        ("my_step", "x, logits.argmax(-1)", "x, my_sample_token(logits, tau, u)", "soft takes the likeliest"),
        ("my_step", "my_sample_token(logits, tau, u)", "logits.argmax(-1)", "draw one, with u"),
        ("my_step", "x, logits.argmax(-1)", "x", "return x, token"),
        ("my_step", "eps is not None", "True", "eps = None"),
    ],
)  # fmt: skip
def test_a_check_says_in_words_what_is_wrong(name, old, new, words):
    assert BODIES[name].count(old) == 1 or old in (" / tau", "tau == 0")
    said = checked(name, **{name: BODIES[name].replace(old, new)})
    assert words in said and "\n" not in said, said


def test_a_check_accepts_whatever_is_right():
    assert all(checked(name) == f"{name}: right" for name in BODIES)
    loops = {
        "my_mixture": """def my_mixture(logits, tau, E):
            rows = []
            for z in logits:
                p = ((z - z.max()) / tau).exp()
                rows.append(sum(p[v] / p.sum() * E[v] for v in range(len(E))))
            return torch.stack(rows)""",
        "my_gaussian_logp": """def my_gaussian_logp(x, mean, sigma):
            normal = torch.distributions.Normal(mean, sigma)
            constant = -math.log(sigma * math.sqrt(2 * math.pi))
            return (normal.log_prob(x.detach()) - constant).sum(dim=1)""",
        "my_rloo_advantages": """def my_rloo_advantages(rewards):
            rewards = rewards.numpy()
            return [[r - np.delete(row, g).mean() for g, r in enumerate(row)] for row in rewards]""",
        "my_pass_at_k": """def my_pass_at_k(n, c, k):
            return 1 - np.prod([max(0, n - c - i) / (n - i) for i in range(k)])""",
        "my_sample_token": """def my_sample_token(logits, tau, u):
            if tau == 0:
                return np.argmax(logits.numpy(), axis=1)
            p = np.exp((logits - logits.max(1, keepdims=True).values).double().numpy() / tau)
            ends = np.cumsum(p / p.sum(1, keepdims=True), axis=1)
            return [int(np.searchsorted(row[:-1], float(v), side="right")) for row, v in zip(ends, u)]""",
    }
    for name, source in loops.items():
        assert checked(name, **{name: source}) == f"{name}: right"
    rows = "def my_mixture(logits, tau, E): return [torch.softmax(z / tau, -1) @ E for z in logits]"
    assert checked("my_mixture", my_mixture=rows) == "my_mixture: right"
    assert checks.adapted(lambda: fractions.Fraction(1, 2))() == 0.5


def test_a_function_that_is_wrong_slow_or_stops_leaves_the_librarys_in_place(capsys, monkeypatch):
    def my_mixture(logits, tau, E):
        raise ValueError("only three tokens, please")

    checks.RIGHT.clear()
    assert not checks.usable("my_mixture", torch.softmax, "softcot.mixture")
    checks.RIGHT.add("my_mixture")
    assert not checks.usable("my_mixture", my_mixture, "softcot.mixture")
    assert not checks.usable("my_mixture", lambda *_: time.sleep(0.15), "softcot.mixture")
    assert checks.usable("my_mixture", lambda *_: None, "softcot.mixture")
    lines = capsys.readouterr().out.splitlines()
    said = ("is not right yet", "only three tokens, please. So softcot.mixture stays", "is right, but", "takes")
    assert len(lines) == 4 and all(words in line for words, line in zip(said, lines))
    checks.RIGHT.clear()


def test_write_it_yourself_says_in_one_line_what_is_missing(tmp_path, classroom):
    said = []
    for name in ("softcot.py", "checks.py", "toy_tasks.py"):
        folder = tmp_path / f"without-{name}" / "uploaded"
        shutil.copytree(classroom, folder, ignore=shutil.ignore_patterns("runs", name))
        if name == "toy_tasks.py":  # a package that isn't there
            (folder / name).write_text("import no_such_package")
        notebook = nbformat.read(HERE / "notebooks" / WRITE, as_version=4)
        notebook.cells = [next(cell for cell in notebook.cells if cell.cell_type == "code")]
        execute(notebook, folder.parent, allow_errors=True)
        said += [o.traceback for o in notebook.cells[0].outputs if o.output_type == "error"]
    assert all(len(lines) == 1 and "\n" not in lines[0] for lines in said)
    assert "lacks softcot.py" in said[0][0] and "upload" in said[0][0]
    assert "lacks notebooks/checks.py:" in said[1][0]
    assert "No module named 'no_such_package': run `%pip install" in said[2][0]


EXERCISES = (HERE / "notebooks" / "exercises.md").read_text()
EXERCISES = dict(re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\Z)", EXERCISES, re.M | re.S))  # text by number
SOLVING = HERE / "notebooks" / "solutions"
DIFFS = {path.stem: path for path in SOLVING.glob("*.diff")}  # by name, which begins with the number


def with_changes(folder, *names):
    """The source of softcot.py with these diffs."""
    shutil.copy(HERE / "softcot.py", folder)
    for name in names:
        apart = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # of no repository
        subprocess.run(["git", "apply", DIFFS[name]], cwd=folder, env=apart, check=True)
    return (folder / "softcot.py").read_text()


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """A function: softcot.py with some diffs, as a module."""

    def load(*names):
        module = types.ModuleType("changed")
        monkeypatch.setitem(sys.modules, "changed", module)
        exec(compile(with_changes(tmp_path, *names), "softcot.py", "exec"), vars(module))
        return module

    return load


def functions(source):
    """What each function of a file says, by name."""
    lines, nodes = source.splitlines(), ast.walk(ast.parse(source))
    nodes = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return {(node.name, i): lines[node.lineno : node.end_lineno] for i, node in enumerate(nodes)}


def test_each_exercise_is_solved_and_its_diffs_change_what_it_says(tmp_path):
    text = (SOLVING / "exercises.md").read_text()
    answers = re.findall(r"^## (\d+)\. ([^\n]*)\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    titles = {number: re.match(r"\*(.+?)[.?]?\*", task)[1] for number, task in EXERCISES.items()}
    assert {number: title.rstrip(".?") for number, title, _ in answers} == titles
    assert list(titles) == [str(n + 1) for n in range(len(titles))] and len(titles) == 12
    before = functions(with_changes(tmp_path))
    for number, _, answer in answers:
        names = [name for name in DIFFS if name.split("_")[0] == number]
        assert set(re.findall(r"\((\w+)\.diff\)", answer)) == set(names)
        asked, found = set(re.findall(r"[Ii]n\s+`([\w.]+)\(\)`", EXERCISES[number])), set()
        for name in names:
            after = functions(with_changes(tmp_path, name))
            here = {key for key in before if before[key] != after[key]}
            assert len(here) == 1, name
            found |= {function for function, _ in here}
        assert {function.split(".")[-1] for function in asked} == found, number
        assert "    python " in answer


def test_the_solutions_about_reward_and_advantage_do_what_they_say(changed):
    rewards = torch.tensor([[0.0, 10, 100, 10], [100, 100, 0, 0]])
    assert torch.equal(changed("1_baseline").rloo_advantages(rewards), rewards)
    for name, wrong in (("9_reward", 0), ("9_reward_90", 90)):
        values = [changed(name).reward(text, "7", str.__eq__) for text in ("7}", "8}", "8")]
        assert values == [100, wrong, 0]


def test_the_solution_about_the_gradient_keeps_it_from_the_embeddings(changed):
    logits, E = torch.randn(3, 7, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    h = changed("2_whose_gradient").mixture(logits, 0.5, E)
    assert torch.equal(h, softcot.mixture(logits, 0.5, E))
    h.square().sum().backward()
    assert E.grad is None and logits.grad.norm() > 0


def test_the_solution_about_mirrored_noise_mirrors_it_in_pairs_of_one_prompt(changed):
    module, policy = changed("6_mirrored_noise"), tiny_policy("llama")
    prompts, seeds = [text for text in PROMPTS for _ in range(4)], seeds_for(12)
    setting = module.Setting("soft", 5.0, 0.33)  # random texts: some end early, and rows move
    policy.tokenizer.eos_token_id = None
    policy.model.generation_config.eos_token_id = list(range(10, 40))
    r = module.rollout(policy, prompts, seeds, setting, 12, 5, 1.0)
    plain = softcot.rollout(policy, prompts, seeds, SETTINGS["soft_sample"], 1, 1, 1.0)
    lengths = r.cot.mask.sum(1)
    assert len(set(lengths.tolist())) > 3
    assert torch.equal(r.cot.eps[::2, 0], plain.cot.eps[::2, 0])
    for n in range(0, 12, 2):
        both = r.cot.mask[n] & r.cot.mask[n + 1]
        assert both.any() and torch.equal(r.cot.eps[n, both], -r.cot.eps[n + 1, both])
    assert (r.cot.eps[0, 0] + r.cot.eps[3, 0]).abs().min() > 0  # another pair


def test_the_solutions_about_precision_round_the_rollout_and_recompute_the_score(changed):
    policy = tiny_policy("llama")
    hidden, E = 3 * torch.randn(5, 32), policy.embeddings().detach()
    eps, sigma, soft = torch.randn(5, 32), torch.tensor(0.1), SETTINGS["soft_sample"]
    how = (policy.head(hidden), soft, E, sigma)
    mean = softcot.next_input(*how, None, None).x.detach()
    x = changed("7_precision").next_input(*how, eps, None).x.detach()
    assert torch.equal(x, mean.bfloat16().float() + sigma * eps) and not torch.equal(x, mean + sigma * eps)
    logits = policy.head(hidden).bfloat16().float()
    found = changed("7_precision_logits").next_input(*how, None, None).x
    assert torch.equal(found, softcot.mixture(logits, soft.tau, E)) and not torch.equal(found, mean)
    module = changed("7_precision", "7_precision_recomputed")  # they go together
    logp, moved = module.positions_logp(policy, soft, 0.1, hidden, None, eps, x)
    assert torch.allclose(logp, softcot.gaussian_logp(x, mean, 0.1), rtol=1e-4)
    assert torch.allclose(moved, (mean.bfloat16().float() - mean).norm(dim=-1) / 0.1, rtol=1e-2)
    changed("7_precision_logits", "7_precision_recomputed")


def test_the_solution_about_length_weighs_a_row_by_its_tokens(changed):
    module, policy, advantages = changed("8_length"), tiny_policy("llama"), torch.tensor([1.0, -2, 3])
    r = module.rollout(policy, PROMPTS, seeds_for(3), SETTINGS["soft_sample"], 12, 5, 1.0)
    cot, answer, _ = softcot.log_probs(policy, r)
    tokens = r.cot.mask.sum(1) + r.answer.mask.sum(1)
    loss = module.policy_gradient(policy, r, advantages)["loss"]
    wanted = -(advantages * (cot.sum(1) + answer.sum(1)) / tokens).mean().item()
    assert loss == pytest.approx(wanted, rel=1e-4)


def test_the_solution_off_policy_updates_twice_and_sees_means_move(changed, monkeypatch):
    problems = [Problem(i, text, "1", str.__eq__) for i, text in enumerate(PROMPTS[:2])]
    config = softcot.Config(steps=1, samples=4, max_cot=6, max_answer=2, lr=0.01, tau=0.5, sigma_scale=0.33)
    steps, moved = [], []
    for module in (softcot, changed("10_off_policy")):
        rewards = itertools.cycle([0.0, 100])
        monkeypatch.setattr(module, "reward", lambda *_: next(rewards))
        policy = tiny_policy("llama")
        optimizer = module.make_optimizer(policy, config)
        metrics, _, _ = module.train_step(policy, problems, 0, config, optimizer)
        steps.append(optimizer.state[next(policy.model.parameters())]["step"].item())
        moved.append(metrics["mean_moved"])
    assert steps == [1, 2] and moved[0] < 1e-4 and moved[1] > 1e-2, moved


# ------------------------------------------------------------------------------------------------
# Parts 12 and 14: runs that survive kills, signals, full disks, bad numbers, bad input
# ------------------------------------------------------------------------------------------------


def command_of(folder, out, *more):
    """The file and the arguments of tiny_run() for another process."""
    run = ["--model", str(folder), "--out-dir", str(out), *SMALL, "--threads", "1", *more]
    return [str(HERE / "softcot.py"), *run]


def assert_same_outcome(ours, theirs):
    """Two folders of runs hold the same metrics (but times), samples, evaluations and weights."""
    pairs = zip(read_lines(ours / "metrics.jsonl"), read_lines(theirs / "metrics.jsonl"), strict=True)
    for a, b in pairs:
        assert {k: a[k] for k in a if k not in TIMES} == {k: b[k] for k in b if k not in TIMES}
    assert (ours / "samples.jsonl").read_text() == (theirs / "samples.jsonl").read_text()
    assert read_json(ours / "eval.json") == read_json(theirs / "eval.json")
    states = [torch.load(f / "state.pt", weights_only=True) for f in (ours, theirs)]
    flat = [torch.utils._pytree.tree_leaves(state) for state in states]
    assert len(flat[0]) == len(flat[1])
    for a, b in zip(*flat):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    best = [transformers.AutoModelForCausalLM.from_pretrained(f / "model") for f in (ours, theirs)]
    for a, b in zip(*(model.parameters() for model in best)):
        assert torch.equal(a, b)


def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(tiny_folder, tmp_path):
    """kill -9, KILLS times (an environment variable), within a second or two after some event."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rng, kills = np.random.default_rng(0), int(os.environ.get("KILLS", 2))
    more = ("--steps", str(12 * kills), "--dtype", "bf16")
    assert softcot.main(command_of(tiny_folder, whole, *more)[1:]) == 0
    reached = []
    state = killed / "state.pt"
    for kill in range(kills):  # every other one after a new saved state, or once it is at work
        before = state.stat().st_mtime_ns if state.exists() else 0
        begun = (killed / "config.json").exists()
        process = Fork(command_of(tiny_folder, killed, *more, *(["--resume"] if begun else [])))
        while process.exitcode is None:
            at_work = "Config(" in process.said()[0]
            saved = state.exists() and state.stat().st_mtime_ns != before
            if saved or (at_work and kill % 2):
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1 + kill % 2))
        assert process.exitcode in (None, 0), process.said()
        process.kill()
        process.join()
        for name in ("eval.json", "config.json"):  # never half a file
            if (killed / name).exists():
                read_json(killed / name)
        if state.exists():
            reached.append(torch.load(state, weights_only=True)["step"])
    print(f"{kills} kills; the saved step after each: {reached}")
    assert reached and reached == sorted(reached)
    assert softcot.main(command_of(tiny_folder, killed, *more, "--resume")[1:]) == 0
    assert_same_outcome(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_with_the_command_to_go_on(
    number, tiny_folder, tmp_path
):
    whole, cut, more = tmp_path / "whole", tmp_path / "cut", ("--steps", "16", "--samples", "8")
    assert softcot.main(command_of(tiny_folder, whole, *more)[1:]) == 0
    process = Fork(command_of(tiny_folder, cut, *more))
    log = cut / "metrics.jsonl"
    while not log.exists() or len(read_lines(log)) < 3:
        assert process.exitcode is None, process.said()
        time.sleep(0.01)
    os.kill(process.pid, number)
    done = process.end()
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("Stopped. To go on: python softcot.py --model ")
    assert last.endswith(" --resume")
    assert 3 <= torch.load(cut / "state.pt", weights_only=True)["step"] == len(read_lines(log)) < 16
    assert softcot.main(command_of(tiny_folder, cut, *more, "--resume")[1:]) == 0
    assert_same_outcome(whole, cut)


def test_a_full_disk_is_one_line_and_the_last_saved_state_stays(tiny_folder, tmp_path):
    whole, full = tmp_path / "whole", tmp_path / "full"
    assert tiny_run(tiny_folder, whole, "--steps", "4", "--threads", "1") == 0
    with pytest.MonkeyPatch.context() as patch:
        break_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            tiny_run(tiny_folder, full, "--steps", "4", "--threads", "1")
    saved = (full / "state.pt").read_bytes()
    command = command_of(tiny_folder, full, "--steps", "4", "--resume")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (len(saved) // 2,) * 2)  # bytes a file
    done = Fork(command, before=limit).end()
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("softcot.py: error: ") and "state.pt: can't be written" in line
    assert "Traceback" not in done.stderr
    assert (full / "state.pt").read_bytes() == saved
    transformers.AutoModelForCausalLM.from_pretrained(full / "model")  # whole, if of a later step
    assert tiny_run(tiny_folder, full, "--steps", "4", "--threads", "1", "--resume") == 0
    assert_same_outcome(whole, full)


# ------------------------------------------------------------------------------------------------
# Parts 10, 14 and 15: what a user may do wrong, or do on another machine
# ------------------------------------------------------------------------------------------------


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_command_touches_a_finished_run_unless_it_resumes_it(tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert tiny_run(tiny_folder, out, "--steps", "2") == 0
    before = contents(out)
    again = ["--model", str(tiny_folder), "--out-dir", str(out), "--steps", "2"]
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    for arguments, says in [
        (again, "--resume goes on with a run, another --out-dir"),
        ([*again, "--task", "gsm8k", "--data-dir", "nowhere"], "is not empty"),
        ([*again, "--prompts", "2", "--samples", "4", "--tau", "0.4"], "is not empty"),
        ([*again[2:], "--model", str(out / "model")], "is not empty"),
        (["--model", str(out), "--out-dir", str(tmp_path / "b")], f"did you mean {out}/model"),
        ([*again[2:], "--model", str(other), "--eval-only"], "is not empty"),
        ([*again[2:], "--model", str(other), "--eval-only", "--resume"], "another --model"),
    ]:
        line = one_line_error(capsys, arguments)
        assert says in line, line
        assert contents(out) == before
    for resumed in (["--resume", "--max-cot", "12"], ["--resume", "--data-dir", "nowhere"]):
        one_line_error(capsys, [*again, *resumed])
        assert contents(out) == before


@pytest.mark.parametrize("fault", ["cut", "older"])
def test_a_state_that_can_not_be_read_is_one_line(fault, tiny_folder, tmp_path, capsys):
    more = ("--steps", "2", "--eval-limit", "0")
    assert tiny_run(tiny_folder, tmp_path / "run", *more) == 0
    path = tmp_path / "run" / "state.pt"
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    else:  # another program may have named things in another way
        state = torch.load(path, weights_only=True)
        torch.save(state | {"optimizer": {"old": torch.zeros(1)}}, path)
    before = contents(tmp_path / "run")
    line = one_line_error(capsys, command_of(tiny_folder, tmp_path / "run", *more, "--resume")[1:])
    assert "state.pt is damaged, or of another softcot.py" in line
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    "flags", ["--max-cot 3000", "--task gsm8k --data-dir nowhere", "--eval-tasks toy math500 --data-dir no"]
)
def test_what_is_refused_leaves_no_folder(flags, tiny_folder, tmp_path, capsys):
    """All data and lengths are looked at before a file is written."""
    arguments = ["--model", str(tiny_folder), "--out-dir", str(tmp_path / "new"), *flags.split()]
    one_line_error(capsys, arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("where", [".", "deeper", ".."])
@pytest.mark.parametrize("more", [[], ["--eval-only"]])
def test_a_run_is_never_written_into_the_folder_of_its_model(where, more, tiny_folder, tmp_path, capsys):
    model = shutil.copytree(tiny_folder, tmp_path / "runs" / "model")
    before = contents(tmp_path)
    arguments = ["--model", str(model), "--out-dir", str(model / where), *more]
    says = "in the folder of --model" if where == "deeper" else "is not empty"
    assert says in one_line_error(capsys, arguments)
    assert contents(tmp_path) == before


def test_records_name_their_model_and_its_weights(tiny_folder, tmp_path):
    assert tiny_run(tiny_folder, tmp_path, "--steps", "1", "--eval-settings", "hard_greedy") == 0
    base, trained = read_json(tmp_path / "eval.json")
    assert [base["stage"], trained["stage"]] == ["base", "trained"]
    assert base["model"] == trained["model"] == str(tiny_folder)
    assert base["weights"] != trained["weights"]


@pytest.mark.parametrize(
    "arguments, folder",
    [
        ([], "runs/toy-soft-s0"),
        (["--cot", "hard", "--seed", "3"], "runs/toy-hard-s3"),
        (["--model", "Qwen/Qwen2.5-0.5B", "--task", "gsm8k"], "runs/gsm8k-Qwen2.5-0.5B-soft-s0"),
        (["--model", "runs/x/model", "--task", "toy"], "runs/toy-x-soft-s0"),
        (["--model", "a/b", "--eval-only", "--task", "math500"], "runs/math500-b-eval"),
    ],
)
def test_the_default_folder_names_task_model_mode_and_seed(arguments, folder):
    assert softcot.filled(softcot.parse(arguments)).out_dir == folder


def test_an_editor_may_save_softcot_while_it_runs(tmp_path):
    for name in ("softcot.py", "toy_tasks.py"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(HERE / "results", tmp_path / "results", ignore=lambda *_: {"toy"})
    program = "import softcot; open('softcot.py', 'w').write('?'); print(softcot.GRADER.equal('2', '\\\\frac42'))"
    (tmp_path / "program.py").write_text(program)
    done = Fork(["program.py"], tmp_path).end()
    assert done.stdout == "True\n", done.stderr


def test_a_grader_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(softcot, "JUDGE", "import nothing_of_the_kind")
    with pytest.raises(softcot.UserError, match="No module named 'nothing_of_the_kind'.*pip install"):
        softcot.Grader().equal("1", "2")


@pytest.mark.parametrize("limit", ["raise ValueError", "raise OSError", "raise ImportError"])
def test_a_grader_works_where_its_memory_can_not_be_limited(limit, monkeypatch):
    """As on Windows, on macOS, and under a lower limit."""
    judge = softcot.JUDGE.replace("import resource\n", f"{limit}\n")
    assert judge != softcot.JUDGE
    monkeypatch.setattr(softcot, "JUDGE", judge)
    assert softcot.Grader().equal("0.5", "\\frac12") and not softcot.Grader().equal("0.5", "\\frac13")


def test_a_bug_has_a_traceback_and_a_mistake_has_one_where_it_is_asked_for(tiny_folder, tmp_path, monkeypatch):
    def broken(*_):
        return undefined_name  # noqa: F821

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softcot, "next_input", broken)
        with pytest.raises(NameError):
            tiny_run(tiny_folder, tmp_path / "a", "--steps", "1")
        patch.setattr(softcot, "check_policy", broken)
        with pytest.raises(NameError):
            tiny_run(tiny_folder, tmp_path / "b", "--steps", "1")
    monkeypatch.setenv("SOFTCOT_DEBUG", "1")
    with pytest.raises(softcot.UserError) as error:
        softcot.main(["--task", "gsm8k", "--model", str(tmp_path / "nothing")])
    assert error.value.__cause__ is not None


def test_the_program_runs_in_a_thread_as_in_a_server(tiny_folder, tmp_path):
    found = []
    more = ("--steps", "1", "--eval-settings", *softcot.Config().eval_settings)
    thread = threading.Thread(
        target=lambda: found.append(tiny_run(tiny_folder, tmp_path / "out", *more))
    )
    thread.start()
    thread.join()
    assert found == [0]
    records = [(row["stage"], row["setting"]) for row in read_json(tmp_path / "out" / "eval.json")]
    assert records == list(itertools.product(("base", "trained"), SETTINGS))  # all, by default


def test_the_program_runs_without_the_modules_of_unix(tmp_path, tiny_folder):
    """fcntl and resource are not there on Windows."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("fcntl", "resource"):
        (hidden / f"{name}.py").write_text("raise ImportError('not on this machine')")
    command = command_of(tiny_folder, tmp_path / "out", "--steps", "2", "--task", "mine.jsonl")
    rows = [{"question": f"3+{i % 5 + 1}=", "answer": "$x^2$"} for i in range(30)]
    distinct = [row | {"question": f"{i}" + row["question"]} for i, row in enumerate(rows)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in distinct))
    more = ["--max-cot", "6", "--max-answer", "4"]
    without = partial(sys.modules.update, fcntl=None, resource=None)
    how = dict(PYTHONPATH=str(hidden), SOFTCOT_DEBUG="1")
    done = Fork([*command, *more], tmp_path, without, **how).end()
    assert done.returncode == 0, done.stderr
    assert len(read_lines(tmp_path / "out" / "metrics.jsonl")) == 2


def test_the_code_of_a_folder_is_never_run(tiny_folder, tmp_path, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "foreign")
    config = read_json(folder / "config.json")
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    assert "--model" in one_line_error(capsys, ["--model", str(folder), "--out-dir", str(tmp_path / "out")])
    assert not (tmp_path / "was run").exists()


def test_curves_are_drawn_while_a_run_lasts_and_samples_say_what_was_asked(tiny_folder, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softcot, "Figure", matplotlib.figure.Figure)
        break_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            tiny_run(tiny_folder, tmp_path, "--steps", "40")
    assert (tmp_path / "curves.png").stat().st_size > 10000
    row = read_lines(tmp_path / "samples.jsonl")[0]
    terms = row["prompt"].removesuffix("=").split("+")
    assert len(terms) == 6 and str(sum(map(int, terms))) == row["gold"]


def test_a_full_disk_is_foreseen(tiny_folder, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    arguments = ["--model", str(tiny_folder), "--out-dir", str(tmp_path / "out")]
    assert "GiB" in one_line_error(capsys, arguments) and not (tmp_path / "out").exists()


def test_the_state_is_saved_more_seldom_if_that_takes_long(tiny_folder, tmp_path, monkeypatch):
    saved, real = [], softcot.save_state

    def slow(path, policy, optimizer, step, best):
        saved.append(step)
        time.sleep(0.3)
        real(path, policy, optimizer, step, best)

    monkeypatch.setattr(softcot, "save_state", slow)
    assert tiny_run(tiny_folder, tmp_path, "--steps", "30", "--eval-limit", "0") == 0
    assert saved[0] == 1 and saved[-1] == 30 and len(saved) < 6


def test_what_a_task_fills_in_fits_what_was_asked_for(capsys, tiny_folder):
    filled = lambda *flags: softcot.filled(softcot.parse(["--device", "cpu", *flags]))
    real = ("--model", "m", "--task", "gsm8k")
    assert filled(*real).eval_max_cot == 512 and filled(*real, "--max-cot", "32").eval_max_cot == 32
    assert filled().threads == 1 and filled(*real).threads == torch.get_num_threads()
    config = filled("--model", str(tiny_folder), "--prompts", "3000")
    softcot.load_data(softcot.load_policy(config, str(tiny_folder)), config)
    assert "1920 problems for --prompts 3000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "without, with_noise, says",
    [(0.4, 0.39, "too little"), (0.4, 0.3, None), (0.4, 0.02, None), (0.4, 0.005, "too much")],
)
def test_training_says_what_the_noise_costs(without, with_noise, says):
    config = softcot.filled(softcot.Config(device="cpu"))
    figures = {"toy soft_greedy pass@1": without, "toy soft_sample pass@1": with_noise}
    found = softcot.noise_advice(config, figures)
    assert f"success {with_noise:.3f}, without it {without:.3f}" in found
    assert says in found if says else not found.partition("without it ")[2].partition(":")[1]
    assert softcot.noise_advice(config, {}) == ""
    config = softcot.filled(softcot.Config(model="m", task="math", device="cpu"))  # tested on math500
    figures = {name.replace("toy", "math500"): figure for name, figure in figures.items()}
    assert softcot.noise_advice(config, figures) == found


@pytest.mark.parametrize("family, factor", [("Granite", 1 / 8), ("Cohere", 1 / 16)])
def test_a_factor_behind_the_head_is_found(family, factor, tmp_path):
    tokenizer = toy_tasks.make_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, pad_token_id=0,
                 initializer_range=0.2, bos_token_id=None)  # fmt: skip
    scaled = {"Granite": {"logits_scaling": 8.0}, "Cohere": {"logit_scale": 1 / 16}}[family]
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**sizes, **scaled)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = softcot.filled(softcot.Config(model=str(tmp_path), device="cpu"))
    policy = softcot.load_policy(config, str(tmp_path))
    assert policy.logit_scale == pytest.approx(factor, rel=1e-4)
    ids = torch.tensor([[5, 9, 30, 2]])
    hidden = policy.model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(policy.head(hidden), policy.model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family, sizes, says",
    [
        ("CTRL", dict(n_embd=32, n_layer=2, n_head=4, dff=48), "logits differ"),
        ("Rwkv", dict(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32), "logits differ"),
        ("OpenAIGPT", dict(n_embd=32, n_layer=2, n_head=4), "(The size of"),
        ("Mpt", dict(d_model=32, n_layers=2, n_heads=4), "("),
        ("Bloom", dict(hidden_size=32, n_layer=2, n_head=4), "("),
    ],
)
def test_a_model_that_would_be_trained_wrongly_is_refused(family, sizes, says, tmp_path, capsys):
    tokenizer = toy_tasks.make_tokenizer()
    torch.manual_seed(0)
    ids = dict(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, initializer_range=0.3)
    config = getattr(transformers, family + "Config")(**sizes, **ids)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    line = one_line_error(capsys, ["--model", str(tmp_path), "--task", "toy"], progress=True)
    assert "can't be used" in line and says in line


def test_odd_answers_and_questions_of_a_file_are_read_as_they_are_meant(tiny_folder, tmp_path, capsys):
    rows = [{"problem": None, "question": f"{n}+1=", "answer": n + 1} for n in range(20)]
    rows += [{"question": "a", "answer": math.nan}, {"question": "b", "answer": ["1", 2]}]
    rows += [{"question": "c", "answer": "1234567890"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = str(tmp_path / "mine.jsonl")
    config = softcot.filled(softcot.parse(["--task", task, "--model", str(tiny_folder), "--max-answer", "3"]))
    policy, splits = softcot.load_policy(config, str(tiny_folder)), ("train", "validation", "test")
    problems = [p for split in splits for p in softcot.load_problems(config, task, split)]
    found = {problem.prompt[-14:-11]: problem.gold for problem in problems}
    assert len(problems) == 22 and "1, 2" in found.values() and "nan" not in found.values()
    assert "1 repeated or without an answer" in capsys.readouterr().out
    softcot.fitting(policy, problems, config)
    assert "right answers are longer than --max-answer 3" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [
    {"sliding_window": 20}, {"attention_chunk_size": 20}, {"original_max_position_embeddings": 20},
])  # fmt: skip
def test_the_context_ends_where_a_window_slides_or_longrope_changes(limit, tiny_folder):
    """Gaps would use up a window, and beyond LongRoPE's switch all angles depend on the longest row."""
    config = softcot.filled(softcot.Config(model=str(tiny_folder), device="cpu"))
    policy = softcot.load_policy(config, str(tiny_folder))
    problems = softcot.load_problems(config, "toy", "test")[:3]
    for name, value in limit.items():
        setattr(policy.model.config, name, value)
    with pytest.raises(softcot.UserError, match="context of 20 tokens"):
        softcot.fitting(policy, problems, config)


def test_text_that_goes_on_is_not_given_a_space_of_its_own():
    """Llama 2's tokenizer puts one before each text."""
    policy = tiny_policy("llama")
    plain, _ = policy.tokenize([" b", "c"], begins=False)
    inner = policy.tokenizer._tokenizer
    inner.normalizer = normalizers.Prepend(" ")
    assert policy.decode(policy.tokenizer(" b").input_ids) == "  b"
    ids, _ = policy.tokenize([" b", "c"], begins=False)
    assert torch.equal(ids, plain)
    begins, _ = policy.tokenize(["c"])
    assert policy.decode(begins[0]) == " c"  # as the model knows it


def test_a_resumed_run_does_not_hold_on_to_the_file_of_its_state(tiny_folder, tmp_path):
    """It will be replaced: Windows would refuse that, and Linux keep it on the disk."""
    assert tiny_run(tiny_folder, tmp_path, "--steps", "2", "--eval-limit", "0") == 0
    config = softcot.filled(softcot.Config(model=str(tiny_folder), device="cpu"))
    policy = softcot.load_policy(config, str(tiny_folder))
    optimizer = softcot.make_optimizer(policy, config)
    assert softcot.load_state(tmp_path / "state.pt", policy, optimizer)[0] == 2
    assert any(moments["exp_avg"].any() for moments in optimizer.state.values())
    gc.collect()
    assert "state.pt" not in Path("/proc/self/maps").read_text()


def test_a_tokenizer_that_ends_each_text_is_not_taken_at_its_word():
    """The model would be asked to go on behind the end."""
    policy = tiny_policy("llama")
    plain, _ = policy.tokenize(["abc", "a"])
    policy.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", policy.tokenizer.eos_token_id)]
    )
    assert policy.tokenizer("abc").input_ids[-1] == policy.tokenizer.eos_token_id
    ids, mask = policy.tokenize(["abc", "a"])
    assert torch.equal(ids[mask], plain[mask]) and mask.sum(1).tolist() == [3, 1]


def test_a_tokenizer_that_loses_the_stop_phrase_is_refused(tiny_folder, tmp_path, capsys):
    def lose(model, tokenizer):
        tokenizer._tokenizer.normalizer = normalizers.Lowercase()

    line = one_line_error(capsys, ["--model", str(changed_copy(tiny_folder, tmp_path / "m", lose))], True)
    assert "its tokenizer loses 'The final answer is: '" in line


def test_no_number_picks_a_token_that_cannot_be():
    """u is never 0, where the first token of any chance at all, 1e-39 say, would be taken."""
    logits = torch.full((1, 50), -90.0)
    logits[0, 30] = 0.0
    smallest = torch.tensor([2.0**-24])
    assert softcot.sample_token(logits, 1.0, smallest).item() == 30


# ------------------------------------------------------------------------------------------------
# Part 13: several processes
# ------------------------------------------------------------------------------------------------


def torchrun(processes, command):
    """Start a command of command_of() in several processes; its output is one stream of text."""
    limit = ["timeout", "--kill-after", "1", "300", sys.executable]  # seconds: none waits for ever
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*limit, *start, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
    )  # fmt: skip


def children(pid):
    """The processes that a process started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


AGENT = """
import multiprocessing, os, runpy, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def worker(*command):
    sys.argv = list(command)
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:  # a function would wait until the agent has read its value
        sys.stdout.flush()
        os._exit(end.code)

multiprocessing.current_process()._config["daemon"] = False  # it has children
one_node = dict(min_nodes=1, max_nodes=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
how = LaunchConfig(**one_node, nproc_per_node=int(sys.argv[1]), max_restarts=0, start_method="fork")
elastic_launch(how, worker)(*sys.argv[2:])
"""  # what torchrun runs, but that its workers are forks, too


def assert_nearly_the_same_run(ours, theirs, base):
    """Two folders of runs hold the same metrics, evaluations and weights, up to rounding."""
    pairs = zip(read_lines(ours / "metrics.jsonl"), read_lines(theirs / "metrics.jsonl"), strict=True)
    for a, b in pairs:
        for key in a.keys() - {*TIMES, "logp_gap"}:
            slack = {"loss": 0.05}.get(key, 1e-5)  # it is a sum of large numbers of both signs
            assert a[key] == pytest.approx(b[key], rel=0.01, abs=slack), (key, a["step"])
        assert max(a["logp_gap"], b["logp_gap"]) < 1e-3
    assert any(row["mixed_groups"] for row in read_lines(ours / "metrics.jsonl"))
    for a, b in zip(read_json(ours / "eval.json"), read_json(theirs / "eval.json"), strict=True):
        assert a["correct"] == b["correct"]
        assert a["cot_entropy"] == pytest.approx(b["cot_entropy"], 1e-3)
    before = transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    states = [torch.load(f / "state.pt", weights_only=True) for f in (ours, theirs)]
    assert all(states[0][key] == states[1][key] for key in ("step", "best"))
    weights, moments = ([state[key] for state in states] for key in ("model", "optimizer"))
    assert list(weights[0]) == list(weights[1]) == list(before)
    assert moments[0]["state"].keys() == moments[1]["state"].keys()
    changes = [(weights[0][k] - before[k], weights[1][k] - before[k]) for k in before]
    for name, ours_of in moments[0]["state"].items():
        changes.append((ours_of["exp_avg"], moments[1]["state"][name]["exp_avg"]))
        assert ours_of["step"] == moments[1]["state"][name]["step"]
    for a, b in changes:
        assert a.norm() > 0 and (a - b).norm() < 0.01 * a.norm()
    names = [sorted(file.name for file in (f / "model").iterdir()) for f in (ours, theirs)]
    assert names[0] == names[1]
    files = [load_file(f / "model" / "model.safetensors") for f in (ours, theirs)]
    assert files[0].keys() == files[1].keys()  # a tied head is there once
    best = [transformers.AutoModelForCausalLM.from_pretrained(f / "model") for f in (ours, theirs)]
    for a, b in zip(*(model.parameters() for model in best), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_several_processes_do_what_one_does_also_after_a_signal_and_with_another_number(
    tied_folder, tmp_path
):
    """One run by one process; the same by two, stopped by SIGTERM, and gone on with by three."""
    one, many = tmp_path / "one", tmp_path / "many"
    more = ["--steps", "12", "--micro-batch", "60", "--eval-tasks", "toy", "toy-large"]
    more += ["--cot", "hard", "--lr", "1e-4"]
    assert softcot.main(command_of(tied_folder, one, *more)[1:]) == 0
    (tmp_path / "agent.py").write_text(AGENT)
    two = Fork([tmp_path / "agent.py", "2", *command_of(tied_folder, many, *more)])
    while not (many / "metrics.jsonl").exists() or len(read_lines(many / "metrics.jsonl")) < 2:
        assert two.exitcode is None, two.said()
        time.sleep(0.05)
    workers = children(two.pid)
    for process in (*workers, two.pid):  # Ctrl-C reaches workers twice: the agent hands it on
        os.kill(process, signal.SIGTERM)
    output = two.end().stdout
    assert len(workers) == 2
    assert output.count("Stopped. To go on:") == 1, output  # one process of the two speaks
    stopped_after = torch.load(many / "state.pt", weights_only=True)["step"]
    assert stopped_after == len(read_lines(many / "metrics.jsonl")) < 12
    three = ended_together(3, command_of(tied_folder, many, *more, "--resume"))
    assert [done.returncode for done in three] == [0, 0, 0], three
    said = ["after 12 steps of hard training" in done.stdout for done in three]
    assert said == [True, False, False], three
    assert_nearly_the_same_run(one, many, tied_folder)


def test_several_processes_train_soft_tokens(tied_folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("--steps", "1", "--micro-batch", "60")
    assert softcot.main(command_of(tied_folder, one, *more)[1:]) == 0
    ended = ended_together(2, command_of(tied_folder, two, *more))
    assert [done.returncode for done in ended] == [0, 0], ended
    evaluated = [read_json(folder / "eval.json") for folder in (one, two)]
    base = [[row["weights"] for row in rows if row["stage"] == "base"] for rows in evaluated]
    assert base[0] == base[1]  # each process knows its share of the weights
    again = ended_together(2, command_of(tied_folder, two, *more, "--resume"))  # evaluates nothing
    assert [done.returncode for done in again] == [0, 0], again
    assert read_json(two / "eval.json") == evaluated[1]
    states = [torch.load(f / "state.pt", weights_only=True) for f in (one, two)]
    for a, b in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert (a["exp_avg"] - b["exp_avg"]).norm() < 0.005 * a["exp_avg"].norm()
    a, b = (read_lines(folder / "metrics.jsonl")[0] for folder in (one, two))
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.005) and a["mixed_groups"] > 0
    shadows = [[row["shadow"] for row in read_lines(f / "samples.jsonl")] for f in (one, two)]
    firsts = [[[w if isinstance(w, str) else w[0] for w in row] for row in x] for x in shadows]
    assert firsts[0][::2] == firsts[1][:2]  # each shows its own first rows: 0, 1, 2 and 0, 2, 4


def test_several_processes_train_bf16_weights(tied_folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("--steps", "3", "--dtype", "bf16", "--cot", "hard")
    assert softcot.main(command_of(tied_folder, one, *more)[1:]) == 0
    ended = ended_together(2, command_of(tied_folder, two, *more))
    assert [done.returncode for done in ended] == [0, 0], ended
    a, b = (read_lines(folder / "metrics.jsonl")[0] for folder in (one, two))
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05) and a["loss"] != 0
    states = [torch.load(f / "state.pt", weights_only=True)["model"] for f in (one, two)]
    base = transformers.AutoModelForCausalLM.from_pretrained(tied_folder, dtype=torch.bfloat16)
    for name, weight in base.state_dict().items():
        moves = [(state[name].float() - weight.float()) for state in states]
        assert all(move.abs().max() > 0 for move in moves)  # rounded by chance, so not equal
        assert moves[0].mean().item() == pytest.approx(moves[1].mean().item(), abs=2e-3)


def test_more_processes_than_gpus_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(softcot, "PROCESSES", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "more processes than the 1 GPUs" in one_line_error(capsys, [])


def test_several_processes_part_before_python_ends(tmp_path):
    """Gloo's threads are gone by then: with them alive three of five such runs end by SIGABRT."""
    script = tmp_path / "meet.py"
    script.write_text("""
import atexit, os, sys, torch
from torch import distributed as dist

def last():
    tasks = "/proc/self/task"
    names = [open(f"{tasks}/{task}/comm").read() for task in os.listdir(tasks)]
    alive = sum("gloo" in name for name in names)
    line = f"parted: {not dist.is_initialized()} {alive}\\n"
    os.write(2, line.encode())  # in one piece: three processes write here

atexit.register(last)  # before join(): so it comes behind what that registers
import softcot
softcot.join()
dist.init_device_mesh("cpu", (3,))
for i in range(30):
    softcot.gather(i)
    dist.all_gather_into_tensor(torch.empty(3000), torch.randn(1000))
""")
    process = torchrun(3, [str(script)])
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert output.count("parted: True 0") == 3, output


def test_more_processes_than_samples_is_one_line(tied_folder, tmp_path):
    ended = ended_together(3, command_of(tied_folder, tmp_path / "out", "--samples", "2", "--steps", "1"))
    assert [done.returncode for done in ended] == [2, 2, 2], ended
    said = [(done.stdout + done.stderr).count("softcot.py: error: --samples is too small") for done in ended]
    assert said == [1, 0, 0], ended


def test_a_half_written_line_of_a_log_is_dropped(tmp_path):
    log = tmp_path / "log.jsonl"
    assert softcot.read_log(log) == []
    softcot.append_jsonl(log, {"step": 1, "loss": math.pi})
    softcot.append_jsonl(log, {"step": 2, "loss": math.nan})
    whole = log.read_bytes()
    for cut in range(1, 15):
        log.write_bytes(whole + whole[:cut])
        assert [row["step"] for row in softcot.read_log(log)] == [1, 2]
        assert log.read_bytes() == whole
    assert len(softcot.read_log(log, 1)) == 1
    assert log.read_bytes() == whole.splitlines(keepends=True)[0]


def poisoned(patch, steps):
    """Let the advantages of these steps (from 1) be NaN, and with them loss and gradient."""
    calls = []

    def advantages(rewards, real=softcot.rloo_advantages):
        calls.append(1)
        return real(rewards) + (math.nan if len(calls) in steps else 0)

    patch.setattr(softcot, "rloo_advantages", advantages)


def test_a_model_that_has_diverged_is_named_by_its_gradient(tiny_folder, tmp_path, capsys):
    """Its logits are NaN, from which tokens are sampled all the same."""
    nan = torch.full((3, 7), math.nan)
    assert softcot.sample_token(nan, 1.0, torch.tensor([0.1, 0.5, 0.9])).max() < 7
    for mode in ("hard", "soft"):
        more = ["--cot", mode, "--lr", "1e30", "--steps", "12", "--eval-limit", "0"]
        assert tiny_run(tiny_folder, tmp_path / mode, *more) == 2
        assert "ten steps in a row had no finite gradient" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hard_sample", "soft_sample"])
def test_what_a_diverged_rollout_left_behind_is_not_seen_by_the_next(name):
    policy = tiny_policy("llama")
    policy.end_ids = set(range(0, 1000, 3))  # a third of all tokens: rows leave the batch early
    want = sample(policy, SETTINGS[name])
    for buffer in policy.engine.buffers.values():
        if buffer.is_floating_point():
            buffer.fill_(math.nan)
    r = sample(policy, SETTINGS[name])
    assert len(set(want.cot.mask.sum(1).tolist())) > 2
    for field in ("entropy", "logp", "x", "eps"):
        ours, theirs = getattr(r.cot, field), getattr(want.cot, field)
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_a_pad_token_without_an_embedding_is_replaced(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    V = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<beyond>"})
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.9, "top_p": 0.6}))
    policy = softcot.load_policy(softcot.filled(softcot.Config()), str(folder))
    assert policy.tokenize(["1+2=", "1+2+3+4="])[0].max() < V
    policy.model.save_pretrained(tmp_path / "again")  # older transformers refuse a temperature unused


def test_a_real_model_has_all_threads_also_after_the_toy(monkeypatch):
    monkeypatch.setattr(softcot, "THREADS", 7)
    before = torch.get_num_threads()
    assert softcot.filled(softcot.Config(model="any")).threads == 7
    assert softcot.filled(softcot.Config()).threads == 1 and torch.get_num_threads() == before


def test_a_step_without_finite_gradient_is_skipped_and_named(tiny_folder, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, {2, 4})
        assert tiny_run(tiny_folder, tmp_path, "--steps", "5") == 0
    assert [row["skipped"] for row in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 0, 1, 0]
    output = "".join(capsys.readouterr())
    problems = softcot.load_problems(softcot.Config(), "toy", "train")
    for step in (2, 4):
        ids = [p.id for p in softcot.prompts_of_step(problems, step - 1, 2, 0)]
        assert f"step {step} skipped" in output and f"prompts {ids}" in output
    for weight in torch.load(tmp_path / "state.pt", weights_only=True)["model"].values():
        assert weight.isfinite().all()


def test_ten_steps_without_finite_gradient_in_a_row_end_the_run(tiny_folder, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, {2, *range(4, 100)})
        assert tiny_run(tiny_folder, tmp_path, "--steps", "40") == 2
    assert "ten steps in a row had no finite gradient" in capsys.readouterr().err
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 13


def test_a_run_that_cannot_learn_says_so_after_20_steps(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(softcot, "reward", lambda *_: 10.0)
    for steps, said in ((19, 0), (25, 1)):
        out = tmp_path / str(steps)
        assert tiny_run(tiny_folder, out, "--steps", str(steps), "--eval-limit", "0") == 0
        assert "".join(capsys.readouterr()).count("No group had mixed rewards") == said


@pytest.mark.parametrize("function, advice", [
    ("rollout", "--samples"), ("log_probs", "--micro-batch"), ("make_optimizer", "--dtype bf16"),
])  # fmt: skip
def test_out_of_gpu_memory_names_the_phase_and_the_flags(
    function, advice, tiny_folder, tmp_path, capsys, monkeypatch
):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nmore lines")

    monkeypatch.setattr(softcot, function, fail)
    small = f"--steps 2 --eval-limit 0 --prompts 8 --samples 8 --out-dir {tmp_path}".split()
    line = one_line_error(capsys, ["--model", str(tiny_folder), *small], progress=True)
    assert advice in line and "out of GPU memory" in line


LONG = "1+" * 2**20 + "1="  # 2 MB
HOSTILE = {  # name: lines of a file, and whether it can be trained on without the bad row
    "a line of 2 MB": ([{"question": LONG, "answer": "2"}], True),
    "NUL bytes": (['{"question": "a\0b", "answer": "1"}'], False),
    "NUL as JSON": ([{"question": "1+\0 1=", "answer": "2"}], True),
    "half a surrogate pair": (['{"question": "1+1\\ud800=", "answer": "2"}'], False),
    "not UTF-8": ([b'{"question": "\xff\xfe", "answer": "1"}'], False),
    "duplicated keys": (['{"question": "1+1=", "question": "1+2=", "answer": "3"}'], True),
    "a number for a question": ([{"question": 7, "answer": "1"}], False),
    "no answer": ([{"question": "1+1="}], False),
    "null for an answer": ([{"question": "1+1=", "answer": None}], True),
    "a list for an answer": ([{"question": "1+1=", "answer": ["2"]}], True),
    "a number for an answer": ([{"question": "1+1=", "answer": 2}], True),
    "nested without end": (["[" * 200_000], False),
    "a huge number": (['{"question": "1+1=", "answer": ' + "9" * 10_000 + "}"], False),
    "an empty question": ([{"question": "", "answer": "2"}], True),
    "not an object": (["3"], False),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_data_file_is_one_line_or_is_skipped(name, tiny_folder, tmp_path, capsys):
    bad, trains = HOSTILE[name]
    lines = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(30)]
    with open(tmp_path / "mine.jsonl", "wb") as file:
        for line in [*lines[:15], *bad, *lines[15:]]:
            line = json.dumps(line) if isinstance(line, dict) else line
            file.write((line.encode() if isinstance(line, str) else line) + b"\n")
    arguments = ["--task", str(tmp_path / "mine.jsonl"), "--steps", "2", "--max-cot", "4"]
    arguments += "--max-answer 3 --eval-max-cot 4 --eval-settings hard_greedy --eval-k 1".split()
    status = tiny_run(tiny_folder, tmp_path / "out", *arguments, "--eval-limit", "2")
    captured = capsys.readouterr()
    assert status == (0 if trains else 2), captured.err
    if not trains:
        assert len(captured.err.strip().splitlines()) == 1 and "mine.jsonl" in captured.err
    if name in ("a line of 2 MB", "null for an answer"):
        assert "skipped" in captured.out


def test_a_loop_of_links_is_one_line(tiny_folder, tmp_path, capsys):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    line = one_line_error(capsys, ["--model", str(tiny_folder), "--task", str(tmp_path / "a.jsonl")])
    assert "a.jsonl" in line


def changed_copy(folder, new, change):
    """A copy of a model folder in which change(model, tokenizer) was done."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    change(model, tokenizer)
    model.save_pretrained(new), tokenizer.save_pretrained(new)
    return new


def test_models_with_odd_vocabularies_and_tokenizers(tiny_folder, tmp_path, capsys):
    size = len(transformers.AutoTokenizer.from_pretrained(tiny_folder))
    larger = changed_copy(tiny_folder, tmp_path / "a", lambda m, _: m.resize_token_embeddings(size + 7))
    assert tiny_run(larger, tmp_path / "out", "--steps", "2") == 0
    no_pad = changed_copy(tiny_folder, tmp_path / "b", lambda _, t: setattr(t, "pad_token", None))
    assert tiny_run(no_pad, tmp_path / "out2", "--steps", "2") == 0
    smaller = changed_copy(tiny_folder, tmp_path / "c", lambda m, _: m.resize_token_embeddings(size - 7))
    assert "tokenizer" in one_line_error(capsys, ["--model", str(smaller)])
    no_end = changed_copy(tiny_folder, tmp_path / "d", lambda _, t: setattr(t, "eos_token", None))
    assert "end-of-text" in one_line_error(capsys, ["--model", str(no_end)])


def test_an_evaluation_is_not_done_again_with_another_number_of_threads(tiny_folder, tmp_path, monkeypatch):
    """A sum of many floats depends on it."""
    large = changed_copy(tiny_folder, tmp_path / "large", lambda m, _: m.resize_token_embeddings(20_000))
    calls, real = [], softcot.evaluate
    monkeypatch.setattr(softcot, "evaluate", lambda *a, **more: calls.append(a) or real(*a, **more))
    once = ("--eval-only", "--eval-settings", "hard_greedy", "--threads")
    for threads, more in (("1", []), ("3", ["--resume"]), ("4", ["--resume"])):
        assert tiny_run(large, tmp_path / "out", *once, threads, *more) == 0
    torch.set_num_threads(1)
    assert len(calls) == 1


def test_prompts_longer_than_the_context_are_skipped_or_named(tiny_folder, tmp_path, capsys):
    def shorten(model, tokenizer):
        prompt = softcot.PROMPT.replace("QUESTION", "+1" * 10 + "=8+")
        longest = len(tokenizer(prompt).input_ids) + 9 + 2 + 3  # CoT, "... is: \\boxed{", answer
        model.config.max_position_embeddings = longest

    short = changed_copy(tiny_folder, tmp_path / "short", shorten)
    rows = [{"question": "+1" * (n % 3 + 10) + "=" + f"{n}+", "answer": "1"} for n in range(60)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--task", str(tmp_path / "mine.jsonl"), "--steps", "1", "--max-cot", "9"]
    arguments += "--max-answer 3 --eval-settings hard_greedy --eval-k 1".split()
    assert tiny_run(short, tmp_path / "out", *arguments, "--eval-max-cot", "9") == 0
    assert "problems skipped" in capsys.readouterr().out
    assert tiny_run(short, tmp_path / "out2", *arguments, "--eval-max-cot", "20") == 2
    assert "lower --max-cot, --eval-max-cot or --max-answer" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Random inputs
# ------------------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("FUZZ", 30))  # of random inputs
FUZZ = dict(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
FUZZ["suppress_health_check"] = list(HealthCheck)
POLICIES = {}  # made once


@settings(**FUZZ)
@given(
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(list(SETTINGS)),
    stop=st.sampled_from(["zzz", "e", "a", "0"]),  # one letter: CoTs stop at all sorts of places
    prompts=st.lists(st.text("ab c\n", min_size=1, max_size=9), min_size=1, max_size=3, unique=True),
    G=st.integers(2, 4),
    max_cot=st.integers(1, 10),
    max_answer=st.integers(1, 5),
    tokens=st.sampled_from([1, 60, 10**6]),
    seed=st.integers(0, 10**6),
)
def test_invariants_of_random_batches(kind, name, stop, prompts, G, max_cot, max_answer, tokens, seed):
    policy = POLICIES.setdefault(kind, tiny_policy(kind))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softcot, "STOP", stop)
        seeds = seed + torch.arange(G * len(prompts))
        r = sample(policy, SETTINGS[name], prompts, seeds, max_cot, max_answer)
    N = len(seeds)
    for part, longest in ((r.cot, max_cot), (r.answer, max_answer)):
        lengths = part.mask.sum(1)
        assert 1 <= lengths.min() and lengths.max() <= longest
        assert (part.mask == (torch.arange(part.mask.shape[1]) < lengths[:, None])).all()
    # the log-probabilities of the rollout are recomputed, and nothing else has one
    if name.endswith("greedy"):  # there is no density, so take one: of sigma 1, of tau 1
        r.sigma, r.cot.eps = 1.0, None if r.cot.x is None else torch.zeros_like(r.cot.x)
        r.setting = dataclasses.replace(r.setting, tau=r.setting.tau or 1.0)
    cot, answer, moved = softcot.log_probs(policy, r)
    assert (cot[~r.cot.mask] == 0).all() and (answer[~r.answer.mask] == 0).all()
    assert cot.shape == r.cot.mask.shape and answer.shape == r.answer.mask.shape
    torch.testing.assert_close(answer, r.answer.logp, rtol=1e-3, atol=1e-3)
    if name != "hard_greedy":
        scale = 1 + r.cot.logp.abs().max().item()
        torch.testing.assert_close(cot / scale, r.cot.logp / scale, rtol=1e-3, atol=1e-3)
    # what stands in gaps is never read
    other = dataclasses.replace(r, prompt_ids=r.prompt_ids.masked_fill(~r.prompt_mask, 5))
    other.prefill_ids = r.prefill_ids.masked_fill(~r.prefill_mask, 5)
    other.cot = dataclasses.replace(r.cot, ids=r.cot.ids.masked_fill(~r.cot.mask, 5))
    again = softcot.log_probs(policy, other)
    assert all(torch.equal(a, b) for a, b in zip((cot, answer, moved), again))
    # rows without an advantage have no gradient, in micro-batches of any size
    advantages = torch.randn(N, generator=torch.Generator().manual_seed(seed))
    advantages[seed % N] = 0
    _, grads = gradient_of(policy, r, advantages, tokens)
    policy.model.zero_grad()
    kept = [n for n in range(N) if n != seed % N]
    (-(advantages * (cot.sum(1) + answer.sum(1)))[kept].sum() / N).backward()
    for parameter, weight in policy.model.named_parameters():
        if weight.grad is not None:
            scale = weight.grad.abs().max().clamp(min=1e-6)
            assert ((grads[parameter] - weight.grad) / scale).abs().max() < 1e-3, parameter
    assert not gradient_of(policy, r, torch.zeros(N), tokens)[1]


@pytest.fixture(scope="session")
def fuzz_folder(tmp_path_factory):
    """Where the runs of random argument lines leave their results."""
    return tmp_path_factory.mktemp("fuzz")


FLAGS = [flag for flag in map(softcot.flag, vars(softcot.Config())) if flag not in ("--out-dir", "--model")]
VALUES = ["", "0", "1", "2", "3", "-1", "1e-3", "1e400", "nan", "inf", "hard", "soft", "fuzzy", "toy", "x"]
VALUES += ["gsm8k", "math500", "hellaswag", "hard_greedy", "soft_sample", "cpu"]
VALUES += ["cuda:9", "meta", "fp32", "bf16", "bf16-mixed", "true", "/", "\0", "é", "--", "-h9", "--x=1"]


SENSIBLE = "--steps 2|--prompts 2|--samples 3|--max-cot 3|--eval-k 2|--warmup 1|--tau 0.7|--seed 3|--lr 1e-3"
SENSIBLE += "|--sigma-scale 2|--cot fuzzy|--dtype bf16|--resume"
SENSIBLE += "|--eval-only|--micro-batch 1|--eval-settings soft_sample"
ODD = st.tuples(st.sampled_from(FLAGS), st.lists(st.sampled_from(VALUES), max_size=2))
ODD = ODD.map(lambda pair: [pair[0], *pair[1]])
GOOD = st.sampled_from([words.split() for words in SENSIBLE.split("|")])
OUTCOMES = []  # exit statuses


def test_random_argument_lines_run_or_give_one_line(tiny_folder, fuzz_folder):
    OUTCOMES.clear()
    one_random_argument_line(tiny_folder, fuzz_folder)
    print(f"{OUTCOMES.count(0)} of {len(OUTCOMES)} argument lines ran")
    assert len(OUTCOMES) >= EXAMPLES and min(map(OUTCOMES.count, (0, 2))) >= EXAMPLES / 6


@settings(**FUZZ)
@given(words=st.lists(st.one_of(GOOD, GOOD, GOOD, ODD), max_size=4))
def one_random_argument_line(tiny_folder, fuzz_folder, words):
    line = [word for group in words for word in group]
    small = "--steps 1 --prompts 1 --samples 2 --max-cot 2 --max-answer 2 --eval-max-cot 2".split()
    small += ["--eval-limit", "1", "--eval-settings", "hard_greedy", "--model", str(tiny_folder)]
    errors = io.StringIO()
    if "--resume" not in line:
        shutil.rmtree(fuzz_folder, ignore_errors=True)
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = softcot.main([*small, *line, "--out-dir", str(fuzz_folder)])
    torch.set_num_threads(1)
    OUTCOMES.append(status)
    said = [text for text in errors.getvalue().splitlines() if "error:" in text]
    assert status in (0, 2) and len(said) == (status == 2), errors.getvalue()


# ------------------------------------------------------------------------------------------------
# Scripts
# ------------------------------------------------------------------------------------------------


def test_the_script_for_a_gpu_runs_on_a_cpu_with_tiny_shapes(capsys):
    gpu.main(["--tiny"])
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    found = {what.strip(): figure.strip() for what, figure, _ in rows}
    assert len(found) >= 15 and not any("failed" in figure for figure in found.values()), found
    (bad,) = [figure for what, figure in found.items() if "not finite" in what]
    (same,) = [figure for what, figure in found.items() if "plain loop" in what]
    assert bad == "0 []" and re.findall("hard|soft|fuzzy", same) == ["hard", "soft", "fuzzy"]
    pairs = re.findall(r"(\d+) of (\d+)", same)
    assert len(pairs) == 3 and all(agreed == whole != "0" for agreed, whole in pairs), same


def test_the_script_on_rounding_finds_what_rounding_does(tiny_folder, capsys, monkeypatch):
    loaded = softcot.load_policy(softcot.filled(softcot.Config(device="cpu")), str(tiny_folder))
    ids = torch.arange(5)[None]
    exact = loaded.model(ids).logits
    with rounding.arithmetic(loaded, "bf16"):
        assert not torch.equal(loaded.model(ids).logits, exact)  # all layers, of whatever class
    assert torch.equal(loaded.model(ids).logits, exact)
    policy = wide_policy()
    monkeypatch.setattr(softcot, "load_policy", lambda *_: policy)
    monkeypatch.setattr(softcot, "load_problems", lambda *_: [Problem(i, p, "1", None) for i, p in enumerate(PROMPTS)])
    rounding.table("any", ".", 12, 2)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()][2:]
    cosines = {(mode.strip(), pair.strip()): [float(x) for x in both.split(",")]
               for mode, pair, *_, both in rows}  # fmt: skip
    assert cosines["soft", "fp32, fp32"] == pytest.approx([1, 1], abs=1e-3)
    assert cosines["soft", "bf16, fp32"][0] < 0.8 and abs(cosines["soft", "bf16, fp32"][1] - 1) < 1e-3
    assert cosines["hard", "bf16, bf16"] == pytest.approx([1, 1], abs=0.02)
    x = torch.tensor([1.0, 1.00390625, 3.14159274, -5e-30, 0.0])
    assert torch.equal(rounding.rounded(x, 8), x.bfloat16().float())


def test_the_picture_that_moves_has_a_frame_a_position_and_shows_both_models(tiny_folder, tied_folder, tmp_path):
    def frames(*folders):
        out = tmp_path / "walk.gif"
        walk.main([*map(str, folders), "--max-cot", "3", "--out", str(out)])
        with Image.open(out) as picture:
            images = [image.convert("L") for image in ImageSequence.Iterator(picture)]
        grey = np.array([np.array(image, dtype=float) for image in images])  # [T, height, width]
        return np.array_split(grey[:, 60:-40], 2, axis=2)  # left, right; no title, key: in both halves

    policy, r = walk.sampled(str(tiny_folder), walk.SUM + "=", 3)
    (before, after), (same, base) = frames(tiny_folder, tied_folder), frames(tiny_folder, tiny_folder)
    assert len(before) == r.cot.mask.shape[1] == 3
    assert abs(before - same).max() < 40  # a GIF rounds colours
    assert all(abs(x - y).max() > 80 for x, y in zip(after, base))

    totals = [2, 6, 9, 13, 17]
    E, vocab = policy.embeddings().detach(), policy.tokenizer.get_vocab()
    tokens = E[[vocab[word] for word in ("2 ", "6 ", "9 ", "13 ", "17 ", "The final answer is:")]]
    shown = torch.rand(4, 6).softmax(1)  # shares of each token
    torch.testing.assert_close(shown @ tokens @ walk.plane(policy, totals), shown @ walk.places(totals))
