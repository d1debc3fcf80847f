"""softcot: train a language model to think in soft tokens, by reinforcement learning, in one file.

The method is that of "Soft Tokens, Hard Truths" (Butt, Kwiatkowski, Labiad, Kempe, Ollivier; arXiv
2509.19170). An ordinary chain of thought (CoT) samples one token after another. A *soft* CoT feeds
the model, at each step, the average of all token embeddings weighted by their probabilities, plus
Gaussian noise. The noise makes the CoT a random variable with a known density, so REINFORCE
applies; after training, the model is used with ordinary hard tokens.

    p_{t-1} = softmax(logits_{t-1} / tau),   h_t = p_{t-1} E             (eqs 3, 5) mixture
    hard token   x_t ~ p_{t-1},  feed E[x_t]                                 (eq 4) next_input
    soft token   x_t = h_t + sigma * N(0, I),  feed x_t                      (eq 6) next_input
    log pi(x_t | past) = log p_{t-1}(x_t), or -||x_t - h_t||^2 / (2 sigma^2) (eqs 9-10) log_probs
    A_bg = r_bg - mean of the other G-1 rewards of prompt b                 (eq 12) rloo_advantages
    loss = -1/(BG) sum_bg A_bg (sum_t log pi(x_t) + sum_a log pi(a))  (eqs 8, 13-15) policy_gradient

Dimensions of the shape comments:
    B prompts of a step, G samples of each prompt, N = B*G sequences (row n = b*G + g)
    P prompt, T CoT, F prefill, A answer: lengths in tokens; L = P+T+F+A columns, C those just fed
    V vocabulary, D embedding width, H width of the last hidden state, M some rows or positions
    (in the engine N and L are what it has room for; in a micro-batch N and B are its own)
E [V, D] are the token embeddings, tau is a temperature, sigma the noise's standard deviation.
logits, log-probabilities in nats, embeddings: float; ids: int64; masks: bool.
A sequence is laid out as  [prompt P | gap][CoT T | gap][prefill F | gap][answer A | gap].
Gaps are the columns that a shorter row leaves empty. Masks are True on real tokens; positions
count them, so gaps leave no trace. Each column attends to the prompt's first token, at the least.
A CoT ends when its tokens (of a soft one the likeliest) spell the stop phrase "The final answer
is:", at an end token, or after --max-cot tokens. Then `\\boxed{` is put behind it (with the
phrase, if it is missing), and the answer ends where that box closes, at an end token, or after
--max-answer tokens. Reward: 100 if it is right, 10 if wrong, 0 if the box is still open.
Where the paper is silent or ambiguous, and where this differs from it: see the README.
"""

from __future__ import annotations

import argparse, atexit, dataclasses, datetime, gc, json, math, os, re, shlex, shutil
import signal, subprocess, sys, threading, time, weakref
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from matplotlib.figure import Figure
from safetensors import SafetensorError
from torch import Tensor, distributed as dist, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer


# ---- 1. Settings: three ways to think, six ways to run a model ----------------------------------
# Whatever is trained or evaluated runs in a Setting; these six are the paper's.

@dataclass(frozen=True)
class Setting:
    """How the next input is made from the logits."""

    mode: str  # hard: one token's embedding; soft, fuzzy: a mixture of embeddings
    tau: float  # temperature of p = softmax(logits / tau); 0, for hard alone: the arg-max
    noise: float  # sigma, in units of the root-mean-square of E; 0: none


SETTINGS = {  # training samples with "<cot>_sample" and validates with "<cot>_greedy"
    "hard_greedy": Setting("hard", 0.0, 0.0),
    "hard_sample": Setting("hard", 1.0, 0.0),
    "soft_greedy": Setting("soft", 0.5, 0.0),
    "soft_sample": Setting("soft", 0.5, 0.33),
    "fuzzy_greedy": Setting("fuzzy", 0.0001, 0.0),
    "fuzzy_sample": Setting("fuzzy", 0.0001, 0.33),
}
STOP = "The final answer is: "  # what a CoT ends with, but for the last space
BOX = "\\boxed{"  # what opens its answer


# ---- 2. Soft tokens: mixture, noise, densities --------------------------------------------------
# The method itself: how the next input of a chain of thought is made from the logits, and the
# density that it is drawn from. All are functions of tensors.

def mixture(logits: Tensor, tau: float, E: Tensor) -> Tensor:
    """h = p E with p = softmax(logits / tau): the mean embedding under p   (eqs 3, 5).

    logits [..., V], E [V', D] with V' >= V (padded vocabularies) -> [..., D]; with gradient."""
    p, E = torch.softmax(logits.float() / tau, dim=-1), E[: logits.shape[-1]]
    if E.device.type == "cpu" and not torch.is_grad_enabled():
        # tokens that together have less than 2^-24 of each p, fp32's rounding, can be left out: of
        # 150,000 a few hundred stay, and E need not be read (a GPU would wait for their number)
        some = (p.reshape(-1, len(E)) > 2.0**-24 / len(E)).any(0).nonzero().flatten()
        if 16 * len(some) < len(E):
            p, E = p[..., some], E[some]
    with torch.autocast(E.device.type, enabled=False):
        return p.to(E.dtype) @ E


def gaussian_logp(x: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """log N(x; mean, sigma^2 I) less its constant: -||x - mean||^2 / (2 sigma^2)   (eq 10).

    x, mean [..., D], the sample x held constant -> [...] in nats."""
    return -(x.detach().float() - mean.float()).square().sum(-1) / (2 * sigma**2)


def categorical_logp(tokens: Tensor, logits: Tensor, tau: float) -> Tensor:
    """log softmax(logits / tau)[token]: tokens [...], logits [..., V] -> [...] in nats."""
    logp = torch.log_softmax(logits.float() / tau, dim=-1)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits), at temperature 1 in every mode: [..., V] -> [...] in nats."""
    p = torch.softmax(logits.float(), dim=-1)
    return -torch.xlogy(p, p).sum(-1)  # 0 at 0


def sample_token(logits: Tensor, tau: float, u: Tensor) -> Tensor:
    """x ~ softmax(logits / tau) by inverting its distribution function at u   (eq 4).

    logits [N, V], u [N] uniform in (0, 1) -> ids [N]; tau = 0 takes the arg-max. One number a row
    (rather than V, as torch.multinomial draws) lets each row own its random stream."""
    if tau == 0:
        return logits.argmax(-1)
    cdf = torch.softmax(logits.float() / tau, dim=-1).cumsum(-1)
    u = u.unsqueeze(-1) * cdf[:, -1:] * (1 - 1e-6)  # rounding must not reach past the last token
    token = torch.searchsorted(cdf, u, right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)  # of NaN: the step will be skipped


@dataclass
class Step:
    """One position of N rows: the input that next_input() makes, and what is known of it."""

    ids: Tensor  # [N] hard: the tokens; soft, fuzzy: their shadow, the likeliest one, as text
    logp: Tensor  # [N] nats, as the sampler saw it; 0 if deterministic: there is no density
    entropy: Tensor  # [N] nats, of the next-token distribution before noise
    x: Optional[Tensor] = None  # [N, D] the input; in a Phase only of soft CoTs, for the loss
    eps: Optional[Tensor] = None  # [N, D] the noise that was drawn, in units of sigma


def next_input(logits: Tensor, setting: Setting, E: Tensor, sigma: Tensor,
               eps: Optional[Tensor], u: Tensor) -> Step:
    """The next CoT input, made from the logits.

    hard: x = E[token], token ~ p (eq 4).  soft, fuzzy: x = p E + sigma * eps (eq 6).
    logits [N, V], E [V, D], sigma [], eps [N, D] normal (None: no noise), u [N] in (0, 1). The
    host reads no value (hence sigma is a tensor), so a GPU can record and replay it."""
    nats = entropy(logits)  # [N]
    no_density = torch.zeros_like(nats)
    if setting.mode == "hard":
        token = sample_token(logits, setting.tau, u)
        logp = categorical_logp(token, logits, setting.tau) if setting.tau else no_density
        return Step(token, logp, nats, E[token])
    mean, likeliest = mixture(logits, setting.tau, E), logits.argmax(-1)  # [N, D], [N]
    if eps is None:
        return Step(likeliest, no_density, nats, mean)
    x = mean + sigma * eps
    return Step(likeliest, gaussian_logp(x, mean, sigma), nats, x.to(mean.dtype), eps)


def random_words(seeds: Tensor, index: Tensor) -> Tensor:
    """64 random bits for each of seeds [N] and each place index [...] in its stream: [N, ...].

    SplitMix64 (Steele, Lea, Flood 2014), in int64: a counter times an odd constant, then mixed."""
    z = seeds.view(-1, *[1] * index.dim()) + (index + 1) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ unsigned_shift(z, shift)) * factor
    return z ^ unsigned_shift(z, 31)


def unsigned_shift(z: Tensor, bits: int) -> Tensor:
    """z >> bits of an int64, with zeros shifted in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


TRAINING, EVALUATION, ROUNDING = 0, 1, 2  # purposes of random numbers; ROUNDING: see AdamW16


def row_seeds(labels: list[tuple[int, ...]]) -> Tensor:
    """A seed for each row, int64 [N], of its labels: run seed, purpose and others, as problem."""
    seeds = torch.zeros(len(labels), dtype=torch.int64)
    for column in torch.tensor(labels).T:
        seeds = random_words(seeds ^ column, torch.tensor(0))
    return seeds


def draw(seeds: Tensor, position: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """The random numbers of a position [1] of each row: u [N] in (0, 1), eps [N, D] normal.

    Row n's depend on seeds[n] alone: neither its neighbours nor the batch size can change them.
    Each position has 2^20 words of its own: one for u, the others for two eps each (Box and
    Muller). D may be 0."""
    index = (position << 20) + torch.arange(1 + (D + 1) // 2, device=seeds.device)
    words = random_words(seeds, index)  # [N, 1 + D/2]
    u = unsigned_shift(words[:, 0], 41) * 2.0**-23 + 2.0**-24  # not 0, not 1
    words = words[:, 1:]  # 2 x 32 bits each
    radius = (-2 * (((words & 0xFFFFFFFF) + 1) * 2.0**-32).log()).sqrt()
    angle = unsigned_shift(words, 32) * (2 * math.pi * 2.0**-32)
    return u, torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[:, :D]


# ---- 3. The model -------------------------------------------------------------------------------
# A causal language model and its tokenizer: its embeddings E, its head, and what each column may
# attend to. How it is loaded and checked stands further down.

@dataclass(eq=False)
class Policy:
    """A decoder-only model of `transformers`, its tokenizer, and how it computes."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    mixed: bool = False  # bf16 arithmetic on fp32 weights
    logit_scale: float = 1.0  # what the model multiplies its head's output by (Granite, Cohere)
    engine: Optional[Engine] = None  # buffers of the last rollout, for the next one
    # how to call a function that uses the weights: FSDP2 has to see that (see shard())
    call: Callable = lambda function, *arguments: function(*arguments)

    def arithmetic(self):
        """The context in which rollout and loss both run the model.

        Weights cast to bf16 are kept for the backward pass; sampling has copies of its own."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.mixed,
                              cache_enabled=torch.is_grad_enabled())

    def embeddings(self) -> Tensor:
        """E [V, D], with gradient: the embeddings as the model computes them from token ids.

        Usually the weight itself; a subclass of nn.Embedding may scale it (Gemma), so call that."""
        embed = self.model.get_input_embeddings()
        if type(embed) is nn.Embedding:
            return embed.weight
        return embed(torch.arange(embed.num_embeddings, device=self.model.device))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of last hidden states [..., H]; some models (Gemma 2) bound them."""
        output = self.model.get_output_embeddings()
        # fp32: in bf16 logits near 20 are 0.125 apart
        fp32 = {name: w.float() for name, w in output.named_parameters()}
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.logit_scale * torch.func.functional_call(output, fp32, hidden.float())
        bound = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return bound * torch.tanh(logits / bound) if bound else logits

    def run(self, x: Tensor, real: Tensor, columns: Tensor, cache=None, weights=None) -> Tensor:
        """Feed x [N, C, D], which stands in columns [C]; its last hidden states [N, C, H].

        real [N, L]: which columns hold tokens, these included. Each attends to the real ones up to
        itself, and its position is their number, less one. cache has the keys and values of earlier
        columns, and gets those of these. weights, by name, take the place of the model's own."""
        seen = real[:, None] & (torch.arange(real.shape[1], device=real.device) <= columns[:, None])
        dtype = torch.bfloat16 if self.mixed else x.dtype  # that of attention's scores
        mask = torch.zeros(seen.shape, dtype=dtype, device=x.device).masked_fill(~seen, -1e9)
        inputs = dict(inputs_embeds=x, attention_mask=mask[:, None], position_ids=seen.sum(2) - 1)
        inputs |= dict(past_key_values=cache, use_cache=cache is not None)
        model = self.model.base_model
        if weights:
            return torch.func.functional_call(model, weights, (), inputs).last_hidden_state
        return model(**inputs).last_hidden_state

    @cached_property
    def end_ids(self) -> set[int]:
        """The tokens that end a text: some models have several."""
        ids = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id} | set(ids if isinstance(ids, list) else [ids])

    def tokenize(self, texts: list[str], begins=True) -> tuple[Tensor, Tensor]:
        """Right-padded ids and mask [rows, longest] of texts that begin a sequence or go on."""
        rows = self.tokenizer(texts, add_special_tokens=begins).input_ids
        # some tokenizers end each text: then the model would not go on with it
        rows = [row[:-1] if len(row) > 1 and row[-1] in self.end_ids else row for row in rows]
        if not begins:  # Llama 2 puts a space before each text: tokenize "\n" + text, cut "\n" off
            plain = partial(self.tokenizer, add_special_tokens=False)
            both, line = plain(["\n" + x for x in texts]).input_ids, plain("\n").input_ids
            tails = [ids[len(line) :] if ids[: len(line)] == line else None for ids in both]
            rows = [row if tail is None else tail for row, tail in zip(rows, tails)]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        batch = batch.to(self.model.device)
        return batch.input_ids, batch.attention_mask.bool()

    @cached_property
    def piece(self) -> Callable[[int], str]:
        """A function: the text that a token id adds to what stands before it."""
        # the token twice, less its text once, as decode() may drop a text's leading space
        return cache(lambda token: self.decode([token] * 2)[len(self.decode([token])) :])

    def decode(self, ids):
        """Text of token ids, or of each of several rows of them, without special tokens."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ---- 4. Engine: rows that grow column by column, at fixed addresses -----------------------------
# Keys and values are kept, so that each step runs one new column. rollout() and generate() below
# show how it is used: reserve() and feed() a text, run_step() for each position of a phase.
# go_on(), and what it has from part 11, make it fast; skip them.

LOOK = {"cpu": 1, "cuda": 16, "mps": 16}  # positions between two looks at the text
BLOCK = {"cpu": 32, "cuda": 128, "mps": 128}  # columns in use are a multiple of it
SMALLEST = {"cpu": 1, "cuda": 64, "mps": 64}  # a batch of so few rows is not halved: not faster


class Engine:
    """Runs the model over the columns of up to N rows as they come, keeping keys and values.

    Rows 0 .. batch-1 of its buffers are run; rows that have ended may be put behind them. No buffer
    ever moves, and in step() the host reads no value, so a GPU can replay it."""

    def __init__(self, policy: Policy, rows: int, columns: int):
        zeros = partial(torch.zeros, device=policy.model.device)
        self.block = BLOCK[policy.model.device.type]
        columns = -(-columns // self.block) * self.block
        self.policy, self.N, self.L = policy, rows, columns
        self.batch, self.width = rows, columns  # rows and columns in use
        self.filled = 0  # columns that are fed or reserved; next_column counts on the device
        self.order = np.arange(rows)  # [N] the row that stands in each place, from generate() on
        self.real = zeros(rows, columns, dtype=torch.bool)  # [N, L] True on real tokens
        self.next_column = zeros(1, dtype=torch.int64)
        self.position = zeros(1, dtype=torch.int64)  # of the next step, in the random streams
        self.seeds = zeros(rows, dtype=torch.int64)  # [N] of these streams
        self.sigma = zeros(())
        self.hidden, self.E = None, None  # [N, H] of each row's last column; [V, D]
        self.buffers = {}  # by name: the fields of Step, [N, L, ...]; each phase is copied out
        self.setting, self.kept = None, []  # of the phase; which fields of its steps are kept
        self.replays = {}  # recorded steps, by setting and shape
        self.weights = {}  # of linear layers in bf16, by name
        self.keys_and_values = []  # [N, heads, L, head size] each: Keys.update() makes and fills it
        layers = policy.model.config.get_text_config().num_hidden_layers
        self.cache = transformers.cache_utils.Cache(layers=[Keys(self) for _ in range(layers)])
        # memory and stream that all recorded steps share; none where FSDP2 moves the weights
        record = policy.model.device.type == "cuda" and PROCESSES == 1
        self.graphs = (torch.cuda.graph_pool_handle(), torch.cuda.Stream()) if record else ()

    def restart(self) -> None:
        """Empty the columns, and take over the weights as they are now.

        Where arithmetic is bf16 and weights are fp32, those of linear layers are copied, once for
        all tokens. Old keys leave, too: masked ones have weight 0, but 0 times NaN is NaN."""
        self.filled = 0
        for buffer in (self.next_column, self.real, *self.keys_and_values):
            buffer.zero_()
        E = self.policy.embeddings().detach()
        self.E = E if self.E is None or self.E.data_ptr() == E.data_ptr() else self.E.copy_(E)
        if self.policy.mixed:
            for layer, module in self.policy.model.base_model.named_modules():
                for name, w in module.named_parameters() if isinstance(module, nn.Linear) else ():
                    self.weights.setdefault(f"{layer}.{name}", w.detach().bfloat16()).copy_(w)

    def reserve(self, count: int) -> None:
        """Let attention read so many columns more; not in feed(), which a GPU replays as it is."""
        self.filled += count
        self.width = -(-self.filled // self.block) * self.block

    def feed(self, x: Tensor, real: Tensor) -> Tensor:
        """Append columns x [M, C, D] to the batch, and return their hidden states [M, C, H].

        M is the batch; real [M, C]: in each row the real ones come first."""
        M, C = real.shape
        self.columns = self.next_column + torch.arange(C, device=x.device)  # [C] being fed
        self.real[:M].index_copy_(1, self.columns, real)
        used = self.real[:M, : self.width]
        hidden = self.policy.run(x, used, self.columns, self.cache, self.weights)
        if self.hidden is None:
            self.hidden = hidden.new_zeros(self.N, hidden.shape[2])
        self.hidden[:M] = hidden[torch.arange(M, device=x.device), real.sum(1) - 1]
        self.next_column += C
        return hidden

    def arrange(self, places: np.ndarray) -> None:
        """Reorder or copy rows, with all that is kept for each: row i becomes old row places[i]."""
        self.order[: len(places)] = self.order[places]
        moved = np.flatnonzero(places != np.arange(len(places)))
        new, old = (torch.from_numpy(x).to(self.real.device) for x in (moved, places[moved]))
        kept = (self.real, self.seeds, self.hidden, *self.buffers.values(), *self.keys_and_values)
        for buffer in kept:
            buffer[new] = buffer[old]

    def step(self) -> None:
        """One position of the rows in the batch: make the next input, write it down, feed it."""
        M = self.batch
        u, eps = draw(self.seeds[:M], self.position, self.E.shape[1] * (self.setting.noise > 0))
        logits = self.policy.head(self.hidden[:M])  # [M, V]
        eps = eps if self.setting.noise else None
        made = next_input(logits, self.setting, self.E, self.sigma, eps, u)
        for name in self.kept:
            value = getattr(made, name)
            if name not in self.buffers:
                self.buffers[name] = value.new_zeros(self.N, self.L, *value.shape[1:])
            self.buffers[name][:M].index_copy_(1, self.next_column, value[:, None])
        real = torch.ones_like(made.ids[:, None], dtype=torch.bool)  # generate() masks ends
        self.feed(made.x[:, None], real)
        self.position += 1

    def run_step(self) -> None:
        """A step; on a GPU of one process, a replayed one."""
        self.reserve(1)
        key = (self.setting, "x" in self.kept, self.batch, self.width)
        if self.replays.get(key):
            self.replays[key]()
        elif self.graphs and key not in self.replays:
            self.replays[key] = run_and_record(self.step, *self.graphs)
        else:
            self.step()

    def go_on(self, rows: list[int]) -> None:
        """These rows alone need go on: if they are at most half of the batch, halve it."""
        batch = self.batch
        while SMALLEST[self.real.device.type] < batch and 2 * len(rows) <= batch:
            batch = -(-batch // 2)
        if batch < self.batch:
            ended = ~np.isin(self.order[: self.batch], rows)
            self.arrange(np.argsort(ended, kind="stable"))  # who goes on is in front now
            self.batch = batch


# ---- 5. Rollout: think, then answer -------------------------------------------------------------
# N sequences are sampled: the CoT in its mode, an opening of the box, the answer in hard tokens.

@dataclass(kw_only=True)
class Phase(Step):
    """The T positions of a CoT or an answer of N rows: what a Step has, each [N, T, ...]."""

    mask: Tensor  # [N, T] True on real tokens; behind a row's end all other fields are 0

    def tokens(self) -> list[list[int]]:
        """The real ids of each row."""
        return [row[:n] for row, n in zip(self.ids.tolist(), self.mask.sum(1).tolist())]


@dataclass
class Rollout:
    """N sampled sequences and what the loss and the reports need of them; holds no gradient."""

    setting: Setting
    sigma: float  # standard deviation of the noise, in the units of E; 0: none
    prompt_ids: Tensor  # [N, P]
    prompt_mask: Tensor  # [N, P]
    prefill_ids: Tensor  # [N, F]
    prefill_mask: Tensor  # [N, F]
    cot: Phase  # T positions
    answer: Phase  # A positions
    stopped: list[bool]  # whether the CoT ended with the stop phrase
    cots: list[str]  # text of the CoT (of the shadow)
    answers: list[str]  # text after the opening of the box
    shadows: tuple = ()  # of the first few rows: see shadow()


def rows_of(x, index: Tensor):
    """The rows that index [M] selects of a tensor, a list, or these fields of a Phase or Rollout.

    The columns of a Phase end where the longest of these rows does."""
    if isinstance(x, Phase):
        end = x.mask[index].any(dim=0).sum().item()
        return Phase(**{k: v if v is None else v[index, :end] for k, v in vars(x).items()})
    if isinstance(x, Rollout):
        return Rollout(**{k: rows_of(v, index) for k, v in vars(x).items()})
    if isinstance(x, list):
        return [x[i] for i in index.tolist()]
    return x[index] if isinstance(x, Tensor) else x


@torch.no_grad()
def rollout(policy: Policy, prompts: list[str], seeds: Tensor, setting: Setting, max_cot: int,
            max_answer: int, answer_tau: float, keep: bool = True) -> Rollout:
    """Let the policy think about each prompt and answer it; no gradient is recorded.

    prompts, seeds: N of each; a prompt that comes several times is read once. answer_tau:
    temperature of the answer (1 in training, 0 in evaluation). keep: also what the loss needs."""
    different = list(dict.fromkeys(prompts))  # B texts
    ids, mask = policy.tokenize(different)  # [B, P]
    prompt_of = np.array([different.index(text) for text in prompts])  # [N]
    N, P = len(prompts), ids.shape[1]
    F = policy.tokenize([BOX, " " + BOX, STOP + BOX])[0].shape[1]  # at most, to know the room
    with whole_weights(policy), policy.arithmetic():
        engine = engine_with(policy, N, P + max_cot + F + max_answer)  # emptied
        engine.batch = len(different)
        engine.reserve(P)
        engine.feed(engine.E[ids], mask)
        sigma = setting.noise * engine.E.float().square().mean().sqrt().item()
        engine.arrange(prompt_of)
        engine.batch, engine.seeds[:N] = N, seeds
        is_done = lambda text: STOP.strip() in text
        cot, stopped = generate(engine, setting, max_cot, is_done, sigma=sigma, keep=keep)
        cots = policy.decode(cot.tokens())
        spaces = ["" if text[-1:].isspace() else " " for text in cots]
        # a CoT without the phrase is gone on with as it stands, with no space, as in the paper
        openings = [space + BOX if s else STOP + BOX for space, s in zip(spaces, stopped)]
        prefill_ids, prefill_mask = policy.tokenize(openings, begins=False)  # [N, F]
        engine.reserve(prefill_ids.shape[1])
        engine.feed(engine.E[prefill_ids], prefill_mask)
        hard, is_done = Setting("hard", answer_tau, 0.0), lambda text: boxed(text) is not None
        answer, _ = generate(engine, hard, max_answer, is_done, position=max_cot)
    answers = policy.decode(answer.tokens())
    return Rollout(setting, sigma, ids[prompt_of], mask[prompt_of], prefill_ids, prefill_mask,
                   cot, answer, stopped, cots, answers)


def generate(engine: Engine, setting: Setting, limit: int, is_done: Callable[[str], bool],
             position=0, sigma=0.0, keep=False) -> tuple[Phase, list[bool]]:
    """A phase of the N rows in the batch: up to limit steps, each row until is_done(its text).

    position: of the first step in the random streams, so that a CoT and its answer have numbers of
    their own. sigma: of the noise. keep: also what the loss needs. Returns the Phase, in copies,
    and which rows were done. The text is looked at now and then; the tokens that a row has made
    behind its end till then are masked out. What is done must stay so."""
    policy, N, first, device = engine.policy, engine.batch, engine.filled, engine.real.device
    engine.setting, engine.order = setting, np.arange(engine.N)
    engine.kept = ["ids", "logp", "entropy"]
    if keep and setting.mode != "hard":
        engine.kept += ["x", "eps"] if setting.noise else ["x"]
    engine.sigma.fill_(sigma)
    engine.position.fill_(position)
    texts, going, seen = [""] * N, range(N), 0  # going: rows that have not ended
    length = [limit] * N  # until a row's end is seen
    for t in progress(f"sampling, {N} rows", range(1, limit + 1), "token"):  # steps so far
        engine.run_step()
        if t % LOOK[device.type] and t < limit:
            continue
        tokens = engine.buffers["ids"][: engine.batch, first + seen : first + t].tolist()
        new = dict(zip(engine.order, tokens))  # of each row in the batch
        for n in going:
            text = texts[n] + "".join(map(policy.piece, new[n]))
            if not is_done(text) and policy.end_ids.isdisjoint(new[n]):
                texts[n] = text
                continue
            for i, token in enumerate(new[n], start=seen + 1):
                texts[n] += policy.piece(token)
                if is_done(texts[n]) or token in policy.end_ids:
                    length[n] = i
                    break
        seen, going = t, [n for n in going if length[n] > t]
        if not going:
            break
        engine.go_on(going)
    engine.batch = N
    engine.arrange(np.argsort(engine.order[:N]))  # all rows again, in their order
    columns = torch.arange(engine.filled - first, device=device)
    mask = columns < torch.tensor(length, device=device)[:, None]  # [N, T and more]
    engine.real[:N, first : engine.filled] = mask
    T = max(length)
    fields = {name: engine.buffers[name][:N, first : first + T].clone() for name in engine.kept}
    for value in fields.values():
        value[~mask[:, :T]] = 0  # not by * : 0 times NaN is NaN
    return Phase(**fields, mask=mask[:, :T]), [is_done(text) for text in texts]


# ---- 6. Log-probabilities, advantages, gradient -------------------------------------------------
# One pass over what was sampled gives the log-probability of each of its positions, with gradient;
# times the advantages, that is REINFORCE. Chunks and micro-batches change nothing but the memory.
# With one process gather(x) is [x], PROCESSES is 1 and policy.call(f, x) is f(x).

CHUNK = 2**25  # logits in the loss, or weights in AdamW16, at a time: 128 MiB of fp32


def log_probs(policy: Policy, r: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """log pi of each CoT position [N, T] and answer token [N, A] of a rollout, with gradient.

    One pass over the inputs. The stored x of a soft CoT are constants; tokens are embedded again,
    with gradient. Means are computed again (eqs 9, 10). Positions outside the masks are 0. Each
    different prompt runs once (and again in the backward pass), its samples attend to a copy of its
    keys and values. The third tensor, [N, T] without gradient, is how far each mean is from the
    rollout's, in sigma: rounding (0 for hard tokens)."""
    embed = policy.model.get_input_embeddings()
    real = torch.cat([r.prompt_mask, r.cot.mask, r.prefill_mask, r.answer.mask], dim=1)  # [N, L]
    prompts = r.prompt_ids.masked_fill(~r.prompt_mask, -1)  # a pad is like no token
    prompts, prompt_of = prompts.unique(dim=0, return_inverse=True)  # [B, P] different ones, [N]
    P, T, F, A = (x.shape[1] for x in (prompts, r.cot.ids, r.prefill_ids, r.answer.ids))
    ids = torch.cat([r.cot.ids, r.prefill_ids, r.answer.ids], dim=1)  # [N, T+F+A]
    # one call, so that one gradient [V, D] is made
    flat = embed(torch.cat([prompts.clamp(min=0).flatten(), ids.flatten()]))
    # with gradient also where embeddings are frozen, or nothing of it would be recomputed
    prompt_x = flat[: prompts.numel()].unflatten(0, prompts.shape).requires_grad_()  # [B, P, D]
    rest = flat[prompts.numel() :].unflatten(0, ids.shape)  # [N, T+F+A, D]
    if r.cot.x is not None:
        rest = torch.cat([r.cot.x, rest[:, T:]], dim=1)
    columns = torch.arange(P + T + F + A, device=ids.device)
    # a weight that is used twice has no gradient until both uses are done: those of all layers
    # would wait for the prompts, so these are recomputed (FSDP2 can't, and has gradients split)
    read_prompts = partial(recompute, read, use_reentrant=True) if PROCESSES == 1 else read
    with policy.arithmetic():
        first, *kept = read_prompts(policy, prompt_x, prompts >= 0, columns[:P])  # [B, P, H]
        cache = transformers.DynamicCache(zip(kept[::2], kept[1::2]))
        cache.batch_select_indices(prompt_of)
        hidden = policy.run(rest, real, columns[P:], cache)
        hidden = torch.cat([first[prompt_of], hidden], dim=1)  # [N, L, H]
        # a position is predicted from the last real column before it, never from a gap
        last = torch.where(real, columns, 0).cummax(dim=1).values  # [N, L]
        hidden = hidden.take_along_dim(last[:, :, None], dim=1)
        cot, moved = phase_logp(policy, r.cot, r.setting, r.sigma, hidden[:, P - 1 : P + T - 1])
        hard = SETTINGS["hard_sample"]  # temperature 1, at which answers of training are sampled
        answer, _ = phase_logp(policy, r.answer, hard, 0.0, hidden[:, P + T + F - 1 : -1])
    return cot, answer, moved


def read(policy: Policy, x: Tensor, real: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    """policy.run(), and the keys and the values of each layer [B, heads, P, head size]."""
    cache = transformers.DynamicCache()
    with policy.arithmetic():
        hidden = policy.run(x, real, columns, cache)
    return hidden, *(kept for layer in cache.layers for kept in (layer.keys, layer.values))


def phase_logp(policy: Policy, phase: Phase, setting: Setting, sigma: float,
               before: Tensor) -> tuple[Tensor, Tensor]:
    """log pi of a phase's positions, with gradient, and how far their means moved: [N, T] each.

    before [N, T, H]: the hidden states that predict them. The largest tensors of all are logits (V
    a position), so they are made for a chunk of positions at a time, and once more in the backward
    pass. Reentrant: each chunk's gradient is added to the weights' at once."""
    real = [x[phase.mask] for x in (before, phase.ids, phase.eps, phase.x) if x is not None]
    real[0].requires_grad_()  # recomputation needs that, even if all of it is constant
    size = max(1, CHUNK // policy.model.get_input_embeddings().num_embeddings)
    score = partial(recompute, positions_logp, policy, setting, sigma, use_reentrant=True)
    scores = [score(*chunk) for chunk in zip(*(x.split(size) for x in real))]
    logp, moved = (torch.cat(x) for x in zip(*scores))
    zeros = torch.zeros(phase.mask.shape, device=before.device)
    return zeros.masked_scatter(phase.mask, logp), zeros.masked_scatter(phase.mask, moved.detach())


def positions_logp(policy: Policy, setting: Setting, sigma: float, hidden: Tensor, ids: Tensor,
                   eps: Tensor = None, x: Tensor = None) -> tuple[Tensor, Tensor]:
    """log pi of M positions, and how far their means moved, in sigma: [M] each   (eqs 9, 10).

    hidden [M, H], ids [M]; of soft tokens eps and x [M, D]: see Step.
    The sample of a soft token is taken to be where its noise leads from the mean as found here: the
    value is always -||eps||^2 / 2; what informs is the gradient, eps / sigma times that of the
    mean, which on policy is exact. The x that was fed is not used for it: it lies around the mean
    of the rollout, and where two tokens tie, rounding moves a mean by many sigma (embeddings are
    tens to hundreds of sigma apart), which would drown eps."""
    logits = policy.head(hidden)
    if setting.mode == "hard":
        return categorical_logp(ids, logits, setting.tau), torch.zeros(len(ids), device=ids.device)
    mean = mixture(logits, setting.tau, policy.embeddings())
    moved = (x - sigma * eps - mean.detach()).float().norm(dim=-1) / sigma
    return gaussian_logp(mean + sigma * eps, mean, sigma), moved


def rloo_advantages(rewards: Tensor) -> Tensor:
    """A_bg = r_bg - mean of the other G-1 rewards of prompt b   (eq 12): [B, G] -> [B, G]."""
    G = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * G / (G - 1)  # = r - (sum - r) / (G - 1)


def policy_gradient(policy: Policy, r: Rollout, advantages: Tensor,
                    micro_batch: Optional[int] = None) -> dict:
    """Add the gradient of -(1/N) sum_n A_n l_n to the parameters (eqs 8, 13-15).

    advantages [N]; l_n is the sum of the log-probabilities of row n's CoT and answer. N is that of
    the whole rollout, so micro_batch (tokens at a time) changes no gradient but for rounding.
    Returns the loss, and how far rollout and loss are apart, in rows with A != 0 (NaN counts):
    logp_gap: the largest distance of a hard token's log-probability, in nats (answers, too);
    mean_moved: median, 99 % and largest distance of a soft token's mean, in sigma."""
    loss, gaps, moves = 0.0, [torch.zeros(0)], [torch.zeros(0)]
    # rows of a process, on average: FSDP2 takes the mean of the gradients
    N = sum(gather(len(advantages))) / PROCESSES
    columns = sum(x.shape[1] for x in (r.prompt_ids, r.cot.ids, r.prefill_ids, r.answer.ids))
    size = max(1, (micro_batch or affordable_tokens(policy)) // columns)
    indices = advantages.nonzero().flatten().split(size)  # rows with A = 0 add nothing
    parts = [(index, advantages[index]) for index in indices if len(index)]
    # FSDP2 wants as many parts of each process: more of the first row, with A = 0
    nothing = torch.tensor([0], device=advantages.device), 0 * advantages[:1]
    parts += [nothing] * (max(gather(len(parts))) - len(parts))
    for index, advantage in progress("gradient", parts, "part"):
        part = rows_of(r, index)
        cot, answer, moved = policy.call(log_probs, policy, part)  # [rows of the part, T or A]
        part_loss = -(advantage * (cot.sum(1) + answer.sum(1))).sum() / N
        part_loss.backward()
        loss += part_loss.item()
        gaps.append((answer.detach() - part.answer.logp)[part.answer.mask].abs().cpu())
        if r.setting.mode == "hard":
            gaps.append((cot.detach() - part.cot.logp)[part.cot.mask].abs().cpu())
        else:
            moves.append(moved[part.cot.mask].cpu())
    losses, gaps, moves = zip(*gather((loss, torch.cat(gaps), torch.cat(moves))))
    gaps, moves = torch.cat(gaps).numpy(), torch.cat(moves).numpy()
    stats = {"loss": float(np.mean(losses)), "logp_gap": float(gaps.max(initial=0.0))}
    if len(moves):
        names = ("mean_moved", "mean_moved_p99", "mean_moved_max")
        stats |= dict(zip(names, np.quantile(moves, [0.5, 0.99, 1.0]).tolist()))
    return stats


# ---- 7. Training: the optimiser, a step, the loop -----------------------------------------------
# train_step() puts the pieces together. Who came for the method alone may stop behind it.

MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.95)  # AdamW; one spike of the gradient is forgotten after 20 steps, not 1,000
CHECKPOINTS = 20  # validations in a run, at least, if it has as many steps


def prompts_of_step(problems: list[Problem], step: int, B: int, seed: int) -> list[Problem]:
    """The B problems of a step: a fresh shuffle each epoch, as a function of (seed, step) alone."""
    n = len(problems)
    order = lambda epoch: np.random.default_rng([seed, epoch]).permutation(n)
    return [problems[order(i // n)[i % n]] for i in range(step * B, step * B + B)]


def rewarded(policy: Policy, problems: list[Problem], G: int, labels: tuple, setting: Setting,
             max_cot: int, max_answer: int, answer_tau: float,
             keep: bool = True) -> tuple[Rollout, np.ndarray]:
    """A rollout of G samples of each of B problems, and its rewards [B, G]; see rollout().

    The random numbers of a sample depend on (labels, problem, sample) alone; a problem may come
    twice. Of K processes number k rolls out rows k, k+K, ...; all get all rewards."""
    before = [problems[:b].count(problem) for b, problem in enumerate(problems)]
    samples = [(p, n * G + g) for p, n in zip(problems, before) for g in range(G)]
    own = samples[RANK::PROCESSES] or samples[:1]
    seeds = row_seeds([(*labels, problem.id, g) for problem, g in own])
    advice = "out of GPU memory in sampling: lower --samples, --prompts or the longest CoT"
    with explained(torch.OutOfMemoryError, advice):
        prompts = [problem.prompt for problem, _ in own]
        r = rollout(policy, prompts, seeds, setting, max_cot, max_answer, answer_tau, keep)
    values = [reward(a, problem.gold, problem.equal) for a, (problem, _) in zip(r.answers, own)]
    every = gather(values)
    values = [every[n % len(every)][n // len(every)] for n in range(len(samples))]
    if RANK >= len(samples):  # its one row was another's
        r = rows_of(r, torch.arange(0))
    return r, np.array(values).reshape(len(problems), G)


def make_optimizer(policy: Policy, config: Config) -> torch.optim.Optimizer:
    """AdamW of all parameters."""
    kind = AdamW16 if config.dtype == "bf16" else torch.optim.AdamW
    optimizer = kind(policy.model.parameters(), lr=config.lr, betas=BETAS, weight_decay=0.0,
                     foreach=False)  # on a GPU it would copy all weights
    for w in policy.model.parameters():  # or torch's get_state_dict() would make it by a step
        moments = {name: torch.zeros_like(w) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[w] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def learning_rate(config: Config, step: int) -> float:
    """That of a step: linear warm-up, then cosine decay to 0."""
    if step < config.warmup:
        return config.lr * ((step + 1) / config.warmup)  # never 0: no step is made for nothing
    after = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.5 + 0.5 * math.cos(math.pi * after))


def sampled(r: Rollout, rewards: np.ndarray) -> dict:
    """What metrics.jsonl says of the rollouts of all processes and their rewards [B, G]."""
    tokens, answer_tokens = (phase.mask.sum().item() for phase in (r.cot, r.answer))
    own = np.array([tokens, answer_tokens, sum(r.stopped), r.cot.entropy.sum().item()])
    tokens, answer_tokens, stopped, nats = sum(gather(own)).tolist()
    return {
        "reward": rewards.mean().item(), "success": (rewards == 100).mean().item(),
        "mixed_groups": (rewards != rewards[:, :1]).any(axis=1).mean().item(),
        "cot_len": tokens / rewards.size, "stop_rate": stopped / rewards.size,
        "cot_entropy": nats / tokens, "tokens": tokens + answer_tokens,
    }  # fmt: skip


def train_step(policy: Policy, problems: list[Problem], step: int, config: Config, optimizer,
               shown: int = 0) -> tuple[dict, Rollout, np.ndarray]:
    """One step of the algorithm; returns its metrics, rollout [N rows] and rewards [B, G].

    shown: of so many rows the rollout gets the shadows, if they are soft or fuzzy."""
    start = time.perf_counter()
    setting = settings_of(config)[f"{config.cot}_sample"]
    r, rewards = rewarded(policy, problems, config.samples, (config.seed, TRAINING, step), setting,
                          config.max_cot, config.max_answer, answer_tau=1.0)
    rolled = time.perf_counter()
    if r.cot.x is not None:  # before the weights change
        r.shadows = tuple(policy.call(shadow, policy, r, n) for n in range(shown))

    advantages = rloo_advantages(torch.tensor(rewards, dtype=torch.float32)).flatten()  # [B*G]
    advantages = advantages[RANK::PROCESSES].to(policy.model.device)  # [N] of this process
    advice = "out of GPU memory in the backward pass: lower --micro-batch, or add --dtype bf16"
    with explained(torch.OutOfMemoryError, advice):
        fit = policy_gradient(policy, r, advantages, config.micro_batch)
    norm = nn.utils.clip_grad_norm_(policy.model.parameters(), MAX_GRAD_NORM).item()
    lr = optimizer.param_groups[0]["lr"] = learning_rate(config, step)
    figures = sampled(r, rewards)
    nats = figures["cot_entropy"]  # of a diverged model this alone is NaN: no reward differs
    skipped = not math.isfinite(norm + fit["loss"] + nats)
    if skipped:
        ids, what = [p.id for p in problems], f"loss {fit['loss']}, gradient {norm}, entropy {nats}"
        tqdm.write(f"step {step + 1} skipped: {what}; prompts {ids}")
    else:
        torch.manual_seed(row_seeds([(config.seed, ROUNDING, step)]).item())  # of AdamW16's
        optimizer.step()
    optimizer.zero_grad()
    metrics = {
        "step": step + 1, **figures, **fit, "grad_norm": norm, "lr": lr, "skipped": skipped,
        "grader_timeouts": sum(gather(GRADER.timeouts)),
        "rollout_s": rolled - start, "train_s": time.perf_counter() - rolled,
        "tokens_per_s": figures["tokens"] / (rolled - start),
    }  # fmt: skip
    if policy.model.device.type == "cuda":
        metrics["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30  # the most so far
    return metrics, r, rewards


def checkpoint(policy: Policy, config: Config, out: Path, held_out: list, step: int,
               best: float) -> float:
    """Validate greedily and keep the best model so far in out/model; the new best.

    held_out: validation problems; without any the latest model is kept, else of equals the last."""
    greedy = settings_of(config)[f"{config.cot}_greedy"]
    score = float(step)
    if held_out:  # a signal waits: the step behind is to be saved
        score = evaluate(policy, held_out, greedy, config, 1, may_stop=False)["k"]["1"]
    policy.engine = None  # evaluation may have longer CoTs: training is to have that memory
    if score >= best or not (out / "model").exists():
        best = score
        weights = states.get_model_state_dict(policy.model, options=WHOLE)
        once = dict([*policy.model.named_parameters(), *policy.model.named_buffers()])
        weights = {name: w for name, w in weights.items() if name in once}  # a tied head is E

        def save(folder: Path) -> None:
            """Make it an ordinary folder, for from_pretrained()."""
            policy.model.save_pretrained(folder, state_dict=weights)
            policy.tokenizer.save_pretrained(folder)

        write(out / "model", save)
    return best


def train(policy: Policy, config: Config, out: Path, problems: list, held_out: list) -> None:
    """The algorithm: for each step sample, reward, update; now and then validate and save."""
    optimizer = make_optimizer(policy, config)
    if config.resume and (out / "state.pt").exists():
        first, best = load_state(out / "state.pt", policy, optimizer)
    else:
        first, best = 0, checkpoint(policy, config, out, held_out, 0, -1.0)
    # cut both logs behind that step
    history, _ = (read_log(out / name, first) for name in ("metrics.jsonl", "samples.jsonl"))
    every = max(1, config.steps // CHECKPOINTS)
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc=config.cot,
               disable=RANK > 0)
    due = 0.0  # when saving has had its share of the time again
    for step in bar:
        batch = prompts_of_step(problems, step, config.prompts, config.seed)
        last = step + 1 == config.steps
        now = (step + 1) % every == 0 or last
        rows = config.prompts * config.samples // PROCESSES
        shown = min(3, rows) if now or step == 0 else 0
        metrics, r, rewards = train_step(policy, batch, step, config, optimizer, shown)
        append_jsonl(out / "metrics.jsonl", metrics)
        history.append(metrics)
        for n in range(shown):
            problem = batch[n * PROCESSES // config.samples]
            row = {"step": step + 1, "prompt": problem.prompt, "cot": r.cots[n]}
            row |= {"stopped": r.stopped[n], "answer": r.answers[n], "gold": problem.gold}
            row |= {"shadow": r.shadows[n]} if r.shadows else {}
            append_jsonl(out / "samples.jsonl", row | {"reward": rewards.flat[n * PROCESSES]})
        if now:
            bar.set_postfix_str("validation")
            best = checkpoint(policy, config, out, held_out, step + 1, best)
        stop = any(gather(SIGNALS))  # a signal came to some process
        start = time.perf_counter()
        if stop or last or gather(start > due)[0]:
            bar.set_postfix_str("saving")
            save_state(out / "state.pt", policy, optimizer, step + 1, best)
            write(out / "curves.png", partial(plot_curves, history, config.cot))
            due = start + 21 * (time.perf_counter() - start)  # 1 of saving, 20 of training
        if stop:
            raise Stopped
        hopeless = len(history) >= 10 and all(row["skipped"] for row in history[-10:])
        require(not hopeless, "ten steps in a row had no finite gradient: lower --lr")
        if len(history) == 20 and not any(row["mixed_groups"] for row in history):
            tqdm.write("No group had mixed rewards in 20 steps, so nothing is learnt: see"
                       " samples.jsonl; try more --samples, a longer --max-cot or another --task")
        keys = ("reward", "success", "cot_len", "mean_moved_p99")
        shown = {key: round(metrics[key], 2) for key in keys if key in metrics}
        bar.set_postfix(shown | ({"best": round(best, 3)} if held_out else {}))


# ---- 8. Evaluation ------------------------------------------------------------------------------
# pass@k of all settings. What was evaluated before a run was interrupted is not done again.

def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one: 1 - C(n-c,k)/C(n,k).

    ZeroDivisionError if k > n: nothing unbiased can be said then."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def evaluate(policy: Policy, problems: list[Problem], setting: Setting, config: Config, n: int,
             may_stop: bool = True) -> dict:
    """pass@1, 2, 4, ... n of a setting with n samples a problem (1 if it is deterministic).

    k_error: standard error of each pass@k over the problems. entropy_by_position: mean over the
    CoTs that got there, in nats (the paper's Figure 4). Problems go in order of length, so that a
    batch has little padding. may_stop: a signal raises Stopped between two batches."""
    if not (setting.tau if setting.mode == "hard" else setting.noise):
        n = 1
    ordered = sorted(problems, key=lambda problem: len(problem.prompt))
    size = max(1, config.prompts * config.samples // n)  # as many rows as a training rollout has
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    counts, stopped = [], 0  # right samples of each problem; CoTs with the stop phrase
    reached, nats = np.zeros((2, config.eval_max_cot))  # CoTs with a token at t; their entropy
    for batch in progress("evaluation", batches, "batch"):
        if may_stop and any(gather(SIGNALS)):
            raise Stopped
        r, rewards = rewarded(policy, batch, n, (config.seed, EVALUATION), setting,
                              config.eval_max_cot, config.max_answer, answer_tau=0.0, keep=False)
        counts += (rewards == 100).sum(axis=1).tolist()
        stopped += sum(r.stopped)
        T = r.cot.ids.shape[1]
        reached[:T] += r.cot.mask.sum(0).cpu().numpy()
        nats[:T] += r.cot.entropy.cpu().double().sum(0).numpy()  # mps has no float64
    stopped, reached, nats = (sum(x) for x in zip(*gather((stopped, reached, nats))))
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    passed = {str(k): [pass_at_k(n, c, k) for c in counts] for k in ks}
    samples = n * len(problems)
    return {
        "n": n, "problems": len(problems), "correct": counts,
        "k": {k: float(np.mean(values)) for k, values in passed.items()},
        "k_error": {k: float(np.std(v) / max(1, len(v) - 1) ** 0.5) for k, v in passed.items()},
        "cot_entropy": float(nats.sum() / reached.sum()),
        "entropy_by_position": (nats[reached > 0] / reached[reached > 0]).round(4).tolist(),
        "cot_len": float(reached.sum() / samples),
        "stop_rate": stopped / samples,
    }


def evaluate_all(policy: Policy, config: Config, tests: dict, stage: str) -> dict[str, float]:
    """Evaluate --eval-settings on tests (see load_data()), print a table and write eval.json.

    Returns the figures by their names, those of the first task first. What --resume finds there,
    of the same weights, is not done again."""
    path = Path(config.out_dir) / "eval.json"
    rows, figures = json.loads(path.read_bytes()) if path.exists() else [], {}
    records = {(row["stage"], row["task"], row["setting"]): row for row in rows}
    bits = (own_share(w.detach()).float().view(torch.int32) for w in policy.model.parameters())
    # exact: the same for any number of threads; a process sees its share, and adds up that
    weights = sum(gather(sum(x.sum().item() for x in bits)))
    for task, problems in tests.items():
        print(f"\n{stage}, {task}, {config.eval_k} samples of each problem:")
        print("setting         pass@1  +-     pass@n    n  CoT len  stop  entropy")
        for name in config.eval_settings:
            scores = records.get((stage, task, name), {})
            if scores.get("weights") != weights:
                scores = {"stage": stage, "task": task, "setting": name}
                scores |= {"model": config.model or "toy", "weights": weights}
                setting = settings_of(config)[name]
                scores |= evaluate(policy, problems, setting, config, config.eval_k)
                records[stage, task, name] = scores
                write_json(path, list(records.values()))
            n, ks, errors = scores["n"], scores["k"], scores["k_error"]
            line = f"{name:14} {ks['1']:7.3f} {errors['1']:6.3f} {ks[str(n)]:7.3f} {n:4d}"
            print(line, "{cot_len:8.1f} {stop_rate:5.2f} {cot_entropy:8.3f}".format(**scores))
            figures[f"{task} {name} pass@1"] = ks["1"]
    return figures


# ---- 9. Tasks, answers, rewards -----------------------------------------------------------------
# Where questions come from, what the right answer is, and whether another one equals it.

PROMPT = (  # zero-shot, the same for every model; QUESTION is replaced
    "A conversation between a user and an assistant. The user asks a question, and the assistant"
    " thinks it through step by step and then gives the answer. The assistant always ends with:"
    f" {STOP}{BOX}[answer]}}.\nUser: QUESTION\nAssistant:"
)


@dataclass(frozen=True)
class Problem:
    """One question as the model sees it, and the answer that is right."""

    id: int
    prompt: str
    gold: str
    equal: Callable[[str, str], bool]  # whether an answer equals a gold answer


JUDGE = r"""
import functools, json, math, re, sys
from contextlib import suppress
from math_verify import parse, verify

with suppress(ImportError, ValueError, OSError):  # Windows has no such limit, macOS refuses it
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # bytes; 9^9^9^9 wants more

@functools.lru_cache
def read(text):
    return parse("\\boxed{%s}" % text, parsing_timeout=None)

name_in = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]").search  # a letter that is in no command

def same(answer, gold):
    gold, _, tolerance = gold.partition(" within ")
    a, g = read(answer), read(gold)
    sides = re.split(r"[<>\u2264\u2265]|\\[lg]eq?(?![a-z])", answer)  # as -c is not always UTF-8
    named = [side.strip() for side in sides if name_in(side)]
    solved = len(named) == 1 and len(named[0]) == 1  # 0 < x < 1 may be (0,1), but not x^2 < x
    if not verify(g, a, allow_set_relation_comp=solved, timeout_seconds=None):
        return bool(tolerance) and abs(float(a[0]) - float(g[0])) <= float(tolerance) * (1 + 1e-9)
    bases = [re.findall(r"(?<=\d)_\{?(\d+)", text) for text in (answer, gold)]
    if bases[0] and bases[0] != bases[1]:
        return False  # 12_8 is not 12_7
    if ("\\{" in answer) != ("\\{" in gold) and "(" in answer + gold:
        return False  # a set is not a point
    for part in answer.split("=")[:-1] if "=" not in gold else ():
        if not name_in(part) and not verify(g, read(part), timeout_seconds=None):
            return False  # 1 = 2 is not 2
    with suppress(TypeError, ValueError):  # not a number
        return math.isclose(float(a[0]), float(g[0]), rel_tol=1e-3)  # tiny ones count as 0 there
    return True

print("ready", flush=True)
for line in sys.stdin:
    equal = False  # what cannot be read is not the answer
    with suppress(Exception):
        equal = same(*json.loads(line))
    print(json.dumps(bool(equal)), flush=True)
"""  # a program of its own: for each line [answer, gold] it prints whether they are equal

TIDY = (  # what Math-Verify does not read, as (pattern, what it becomes)
    (r"°", r"^\\circ"),
    (r"\\(?:boldsymbol|mathbf|textbf|bm) *\{([^{}]*)\}", r"\1"),
    (r"\\text *\{[^{}]*(?::|\bis) *\}", ""),  # Answer:
    (r"^ *(?=[<>≤≥]|\\[lg]eq?(?![a-z]))", "x"),  # > 9 is not 9
    (r"[\u2212\u2013\u2014]", "-"),
    (r"^\*\*|\*\*$", ""),  # bold, in Markdown
    (r"√ *(\d+)", r"\\sqrt{\1}"),
    (r"^([-+]?[\d.]+)[eE](-?\d+)$", r"\1 \\cdot 10^{\2}"),
    (r"(?<=\d)(?:\\[,!]| )(?=\d{3}(?![\d/]))", ""),  # 10\,000
    (r"^ *(\d+) +(\d+)/(\d+) *$", r"\1\\frac{\2}{\3}"),  # 1 1/4
    (r"(?:\\|[,;.\s])+$", ""),
)


class Grader:
    """Math-Verify in a process that is killed when it takes too long: no answer can hang a run."""

    limit, timeouts, process = 5.0, 0, None  # limit: seconds that one comparison may take

    def equal(self, answer: str, gold: str) -> bool:
        """Whether two LaTeX answers are equal; False, and counted, if that takes too long."""
        for pattern, new in TIDY:
            answer, gold = (re.sub(pattern, new, text.strip()) for text in (answer, gold))
        if ", " in gold:  # several answers
            answer = re.sub(r",(?=\d)", ", ", answer)
        answer = answer.translate({0xFF10 + digit: str(digit) for digit in range(10)})  # wide ones
        if answer == gold:
            return True
        if self.process is None or self.process.poll() is not None:
            self.start()
        verdict, timer = "", threading.Timer(self.limit, self.process.kill)
        timer.start()
        try:
            with suppress(BrokenPipeError):  # killed just now
                print(json.dumps([answer, gold]), file=self.process.stdin, flush=True)
                verdict = self.process.stdout.readline()
        finally:
            timer.cancel()
            if not verdict:  # it is killed, or Ctrl-C came: its verdict must not be the next one's
                self.process.kill()
                self.process.wait()
                self.timeouts += 1
        return verdict == "true\n"

    def start(self) -> None:
        """Start the process; UserError with its last words if it can't."""
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        command = [sys.executable, "-c", JUDGE]
        # a session of its own: Ctrl-C is for the run, not for the grader
        self.process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        if not self.process.stdout.readline():
            again = subprocess.run(command, input="", text=True, capture_output=True)
            last = again.stderr.strip().splitlines()[-1:]
            raise UserError(f"the grader can't start: {last}; try pip install -r requirements.txt")


GRADER = Grader()


AROUND = (  # what is said around a number, as (pattern, what it becomes), in this order
    (r"(?<=\d) +\([^()]*\)$", ""),  # 18 (9 + 9)
    (r"^\((.*)\)$", r"\1"),
    (r"\\?\$|\\?% *$", ""),
    (r"(?<=\d)(?:,\\!|\{,\}|,)(?=\d{3}(?!\d))", ""),  # thousands
    (r"^[^<>=]*[^\d\s.<>=][^<>=]*= *", ""),  # 9 + 9 = 18
    (r"(?i)^[a-z' ]*(?:\bis|\bare|:) +", ""),  # the answer is 18
    (r"(?i)^(?:-|minus\b|negative\b) *", "-"),
    (r"(?i)(?<=[\d}.])(?:\\[,;: ]|~| )*(?:\\(?:text|math|mbox)[a-z]* *\{|(?<= ))(?!\D*\b(?:half|pi|"
     r"dozen|(?:ten|hundred|thousand|[a-z]+illion)(?:th)?|third|quarter|squared|cubed|factorial|"
     r"plus|minus|times|divided|over|or|and|to|[eiknxyz])s?\b)"
     r"[ ~]*[a-z][a-z'./²³ -]*\}?(?:\^\{?\d\}?)?$", ""),  # a unit
)  # fmt: skip
ASK = r"(?=.*[/^\\])(?![/^]|.*(?:\d +\d|/$))(?:[\d. /^{}]|(?<![\d} -])-"  # for Math-Verify
ASK += r"|\\[dt]?frac(?= *[\d{])|\\text|\\circ|\\(?:times|cdot)(?= *10 *\^))*"


@lru_cache(2**16)  # of a group many answers are alike
def same_number(answer: str, gold: str) -> bool:
    """Whether two answers state the same number: `\\$1,200.00` and `1200 apples` do.

    What is not surely one number is none. Math-Verify is asked about fractions and powers only."""
    for pattern, new in TIDY + AROUND:
        answer, gold = (re.sub(pattern, new, text.strip()) for text in (answer, gold))
    try:
        value = float(answer.replace("_", "?"))  # Python reads 1_8 as 18
        return math.isclose(value, float(gold), rel_tol=1e-9, abs_tol=1e-9)
    except ValueError:  # not plain
        return bool(re.fullmatch(ASK, answer)) and GRADER.equal(answer, gold)


def boxed(text: str) -> Optional[str]:
    """What stands in a box whose `\\boxed{` was just opened, or None while it is still open."""
    depth = 1
    for found in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += (found[0] == "{") - (found[0] == "}")
        if depth == 0:
            return text[: found.start()]
    return None


def reward(answer: str, gold: str, equal: Callable[[str, str], bool]) -> float:
    """100 for the right answer, 10 for a wrong one, if it closes its box; else 0."""
    inside = boxed(answer)
    return 0.0 if inside is None else 100.0 if equal(inside, gold) else 10.0


def gold_answer(row: dict) -> str:
    """The right answer of a row: its field `answer`, in GSM8K what follows a solution and `####`.

    OlympiadBench has a list, `$69$,$84$` -> `69, 84`, and maybe an error: `4.2 within 1e-1`; MATH
    only the last box of a `solution`. None and NaN are no answer; of a list all are asked for."""
    if "solution" in row and "answer" not in row and "final_answer" not in row:
        return (boxed(row["solution"].rpartition(BOX)[2]) or "").strip()
    answer = row["final_answer"] if "final_answer" in row else row["answer"]
    if isinstance(answer, list):
        answers = ",".join(map(str, answer)).replace("$", "")
        tolerance = f" within {row['error']}" if row.get("error") else ""
        return re.sub(" *, *", ", ", answers).strip() + tolerance
    return "" if answer is None or answer != answer else str(answer).split("####")[-1].strip()


@dataclass(frozen=True)
class Task:
    """Where questions come from, how answers compare, and the defaults."""

    hub: str  # data set on the Hugging Face hub, and its configurations
    train: Optional[str]  # the hub's name of the split to train on; None: only for evaluation
    test: Optional[str]  # the same for testing; None: problems are held out of train
    defaults: dict  # of Config's fields
    test_on: Optional[str] = None  # the task whose test problems are meant, if not its own
    equal: Callable[[str, str], bool] = GRADER.equal
    prompt: str = PROMPT


PAPER_LR = {"llama-3.2-3b": 6e-6, "llama-3.1-8b": 3e-6, "qwen2.5-3b": 8e-6}
LONG = {"steps": 4000, "prompts": 2, "samples": 32, "max_cot": 512, "max_answer": 32}
LONG |= {"lr": 6e-6, "eval_k": 32, "eval_max_cot": 512, "eval_limit": 128}  # the paper's values
SHORT = LONG | {"max_cot": 128}
TOY = LONG | {"steps": 100, "prompts": 32, "lr": 5e-5}
TOY |= {"max_cot": 9, "max_answer": 3, "eval_max_cot": 9}
MATH = "EleutherAI/hendrycks_math algebra counting_and_probability geometry intermediate_algebra"
MATH += " number_theory prealgebra precalculus"
TASKS = {
    "toy": Task("", "train", "test", TOY, None, same_number, "QUESTION"),
    "toy-large": Task("", None, "test", TOY, None, same_number, "QUESTION"),
    "toy-round": Task("", None, "test", TOY, None, same_number, "QUESTION"),
    "gsm8k": Task("openai/gsm8k main", "train", "test", SHORT, None, same_number),
    "math": Task(MATH, "train", "test", LONG, "math500"),
    "deepscaler": Task("agentica-org/DeepScaleR-Preview-Dataset", "train", None, LONG, "math500"),
    "math500": Task("HuggingFaceH4/MATH-500", None, "test", LONG),
    "olympiadbench": Task("Hothan/OlympiadBench OE_TO_maths_en_COMP", None, "train", LONG),
}


def task_named(name: str) -> Task:
    """A task of the table, or that of the user's own .jsonl file."""
    if name.endswith(".jsonl"):
        return Task("", "train", None, SHORT)
    require(name in TASKS, f"task {name} is unknown: choose from {', '.join(TASKS)}, FILE.jsonl")
    return TASKS[name]


def read_jsonl(path: Path) -> list[dict]:
    """What the lines of a .jsonl file hold; UserError names the one that is not JSON."""
    require(path.is_file(), f"there is no file {path}")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            with explained((ValueError, RecursionError), f"{path} line {number} is not JSON"):
                rows.append(json.loads(line))
    return rows


def read_rows(config: Config, name: str, split: str) -> list[dict]:
    """The rows of a task's "train" or "test" split: toy, own file, --data-dir, or the hub."""
    if name.endswith(".jsonl"):
        return read_jsonl(Path(name))
    if name.startswith("toy"):
        import toy_tasks  # only here and in run(): a copy of this file alone does without it
        return toy_tasks.rows(name, split)
    if config.data_dir:
        return read_jsonl(Path(config.data_dir) / name / f"{split}.jsonl")
    import datasets  # only here: the toy and local files do without it
    hub, *parts = TASKS[name].hub.split()
    failed = f"{hub} can't be loaded; --data-dir DIR reads DIR/{name}/{split}.jsonl instead"
    with explained((OSError, ValueError, ImportError), failed):
        hub_split = getattr(TASKS[name], split)
        loaded = [datasets.load_dataset(hub, part, split=hub_split) for part in parts or [None]]
    return [row for rows in loaded for row in rows]


def load_problems(config: Config, name: str, split: str) -> list[Problem]:
    """The "train", "validation" or "test" problems of a task; says how many rows are no problem.

    Validation problems (and test problems, where the task has no test split) are held out of the
    training split, always the same. Repeated questions and rows without an answer are skipped."""
    task = task_named(name)
    if task.prompt == PROMPT:  # not for the toy, which needs no grader
        task.equal("1/2", "2")  # one that can't start says so now, not in the middle of a run
    source = "test" if split == "test" and task.test else "train"
    rows, by_prompt = read_rows(config, name, source), {}
    for i, row in enumerate(rows):
        wrong = f"{name} {source}: row {i + 1} has no readable question (or problem) and answer"
        with explained((KeyError, TypeError, AttributeError, UnicodeError), wrong):
            prompt = task.prompt.replace("QUESTION", row.get("problem") or row["question"])
            gold = gold_answer(row)
            (prompt + gold).encode()
        if gold:
            by_prompt.setdefault(prompt, Problem(i, prompt, gold, task.equal))
    problems = list(by_prompt.values())
    skipped = f"{len(rows) - len(problems)} repeated or without an answer"
    if source == "train":
        order = np.random.default_rng(0).permutation(len(problems))
        size = min(128, max(1, len(problems) // 10))  # held out, to choose the checkpoint
        first = size if task.test else 2 * size  # where training problems begin
        parts = {"validation": order[:size], "test": order[size:first], "train": order[first:]}
        problems = [problems[i] for i in parts[split]]
    require(problems, f"{name}: the {split} split is empty")
    print(f"{name} {split}: {len(problems)} problems of {len(rows)} rows; skipped: {skipped}")
    return problems


def fitting(policy: Policy, problems: list[Problem], config: Config) -> list[Problem]:
    """The problems that leave room in the model's context for CoT and answer; tells the others.

    The context ends where a window of attention would slide, or LongRoPE's angles would change."""
    text = policy.model.config.get_text_config()
    names = ["max_position_embeddings", "sliding_window", "attention_chunk_size"]
    names += ["original_max_position_embeddings"]  # of LongRoPE
    context = min(getattr(text, name, None) or math.inf for name in names)
    more = max(config.max_cot, config.eval_max_cot) + config.max_answer
    more += len(policy.tokenizer(STOP + BOX).input_ids)
    fits = [p for p in problems if len(policy.tokenizer(p.prompt).input_ids) + more <= context]
    why = f"prompt, CoT and answer do not fit into the model's context of {context} tokens"
    require(fits, f"{why}: lower --max-cot, --eval-max-cot or --max-answer")
    if len(fits) < len(problems):
        print(f"{len(problems) - len(fits)} problems skipped: {why}")
    golds = policy.tokenizer([p.gold + "}" for p in fits], add_special_tokens=False).input_ids
    long = sum(len(gold) > config.max_answer for gold in golds)
    if long:
        print(f"{long} right answers are longer than --max-answer {config.max_answer}")
    return fits


def load_data(policy: Policy, config: Config) -> tuple[list, list, dict[str, list]]:
    """Problems to train on and to validate with, and for each of --eval-tasks those to test on."""
    train, held_out, tests = [], [], {}
    if not config.eval_only:
        train = fitting(policy, load_problems(config, config.task, "train"), config)
        held_out = load_problems(config, config.task, "validation")[: config.eval_limit]
        held_out = fitting(policy, held_out, config) if held_out else []
        if len(train) < config.prompts:
            print(f"{len(train)} problems for --prompts {config.prompts}: some come twice a step")
    for task in config.eval_tasks if config.eval_limit != 0 else ():
        problems = load_problems(config, task, "test")[: config.eval_limit]
        tests[task] = fitting(policy, problems, config)
    return train, held_out, tests


# ---- 10. Loading a model ------------------------------------------------------------------------
# What a model must be able to do is tried once, before anything is trained.

def load_policy(config: Config, source: str) -> Policy:
    """The policy in a folder or on the hub; UserError says why it can't be used."""
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32: 10 bits of mantissa, enough and fast
        torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients can be NaN: pytorch#196678
        if ":" in config.device:  # streams and graphs are made on the current one
            torch.cuda.set_device(config.device)
    errors = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
    errors += (TypeError, AttributeError, AssertionError, ZeroDivisionError, StrictDataclassError)
    with explained((*errors, UserError), f"--model {source} can't be used"):
        require(not (Path(source) / "model").exists(), f"a run: did you mean {source}/model")
        dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        how = {"trust_remote_code": False}  # code in a folder is never run
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **how)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **how)
        policy = Policy(model.to(config.device).eval(), tokenizer, config.dtype == "bf16-mixed")
        require(tokenizer.eos_token, "its tokenizer has no end-of-text token")
        added, V = tokenizer.added_tokens_decoder, model.get_input_embeddings().num_embeddings
        others = sum(id >= V and token.special for id, token in added.items())  # images, say
        require(len(tokenizer) - others <= V, "its tokenizer is larger than it")
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= V:
            tokenizer.pad_token = tokenizer.eos_token
        if not model.generation_config.do_sample:  # else older transformers refuse to save them
            model.generation_config.update(temperature=None, top_p=None, top_k=None)
        again = policy.decode(tokenizer(STOP + BOX, add_special_tokens=False).input_ids)
        kept = STOP.strip() in again and BOX in again
        require(kept, f"its tokenizer loses {STOP!r} in {again!r}")
        rounding = {"fp32": 1e-3 if config.device == "cpu" else 1e-2}  # a GPU has TF32
        check_policy(policy, rounding.get(config.dtype, 1e-1))
    return shard(policy, config) if PROCESSES > 1 else policy


@torch.no_grad()
def check_policy(policy: Policy, close: float) -> None:
    """Does the model compute what the method needs? UserError says what it does not.

    Embeddings must say all that the model reads of a token; and mixtures of them, fed through the
    engine in two parts, in a row with a gap, must give what a plain pass over the row without its
    gap gives. Finds the factor that some models put behind their head."""
    with policy.arithmetic():
        E, model = policy.embeddings(), policy.model
        ids = torch.arange(5, device=E.device)
        p = torch.linspace(0.1, 0.9, 5, device=E.device).view(5, 1).to(E.dtype)
        x = torch.stack([E[ids], p * E[ids] + (1 - p) * E[ids + 1]])  # [2, 5, D]
        real = torch.ones(2, 5, dtype=torch.bool, device=E.device)
        real[1, 2] = False
        engine = Engine(policy, 2, 5)
        engine.restart()
        first = engine.feed(x[:, :3], real[:, :3])
        hidden = torch.cat([first, engine.feed(x[:, 3:], real[:, 3:])], dim=1)[real]  # [M, H]
        tokens = model(ids[None], use_cache=False).logits[0]
        mixtures = model(inputs_embeds=x[1:, real[1]], use_cache=False).logits[0]
        logits = torch.cat([tokens, mixtures]).float()  # [M, V]
        require(logits.shape[-1] <= len(E), "the head knows tokens that have no embedding")
        head = policy.head(hidden)
        factor = ((logits * head).sum() / head.square().sum()).item()
        policy.logit_scale = factor if abs(factor - 1) > close else 1.0
        error = (policy.head(hidden) - logits).abs().max() / logits.abs().max()
        require(error <= close, f"logits differ by {error:.2g} of the largest")


# ---- 11. Speed and memory -----------------------------------------------------------------------
# What makes engine and training fast, or lets them fit, and changes no result but for rounding:
# keys and values at fixed addresses, recorded steps, micro-batches, an AdamW for bf16 weights.

class Keys(transformers.cache_utils.StaticLayer):
    """Keys and values of one layer [N, heads, L, head size], written into the engine's columns."""

    def __init__(self, engine: Engine):
        super().__init__(engine.L)
        self.engine = weakref.proxy(engine)  # no circle: who forgets the engine frees its memory

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Write those of the present columns; return those of all rows and columns in use."""
        engine = self.engine
        if self.keys is None:  # is_initialized stays False: else transformers makes its own masks
            dtype = torch.bfloat16 if engine.policy.mixed else keys.dtype  # as attention wants them
            room = [(engine.N, x.shape[1], engine.L, x.shape[3]) for x in (keys, values)]
            self.keys, self.values = (keys.new_zeros(shape, dtype=dtype) for shape in room)
            engine.keys_and_values += [self.keys, self.values]
        self.keys[: engine.batch].index_copy_(2, engine.columns, keys.to(self.keys.dtype))
        self.values[: engine.batch].index_copy_(2, engine.columns, values.to(self.keys.dtype))
        return tuple(x[: engine.batch, :, : engine.width] for x in (self.keys, self.values))


def run_and_record(step: Callable[[], None], pool, side) -> Optional[Callable[[], None]]:
    """Run a step on a GPU and record it as a CUDA graph; what to call for it from then on, or None.

    A step of decoding is a thousand small kernels, which take longer to launch than to run. It is
    run on the side stream, as recording wants it, and what is made once is made by that. A step
    that waits for the host (some mixtures of experts do) can't be recorded."""
    graph = torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        tqdm.write("decoding is slow: a step of this model waits for the host, is not replayed")
        graph = None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    if graph is None:
        step()  # again, from its start: it broke off before it counted itself
        return None
    with torch.cuda.graph(graph, pool=pool, stream=side):
        step()  # nothing is computed here
    return graph.replay


def engine_with(policy: Policy, rows: int, columns: int) -> Engine:
    """The policy's engine, emptied; a larger one where that has too little room."""
    N, L = (policy.engine.N, policy.engine.L) if policy.engine else (0, 0)
    if rows > N or columns > L:
        policy.engine = None  # free the old one's memory first
        policy.engine = Engine(policy, max(rows, N), max(columns, L))
    policy.engine.restart()
    return policy.engine


def affordable_tokens(policy: Policy) -> int:
    """How many tokens one backward pass may have: as many as the memory has room for.

    Each matrix keeps its input and its output until then: 1 MB a token for a model of 0.5B in bf16.
    On a GPU there are up to four fp32 copies of the head and its gradient, too."""
    device, free = policy.model.device, 2**32  # bytes, on a CPU
    weights, E = list(policy.model.parameters()), policy.model.get_input_embeddings().weight
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        gradients = sum(w.nbytes for w in weights if w.grad is None)
        casts = sum(2 * w.numel() for w in weights) if policy.mixed else 0
        head = 4 * E.numel()
        # 0.6 of what is left: the rest is for what is not counted
        free = 0.6 * (torch.cuda.mem_get_info(device)[0] + unused - gradients - casts - 4 * head)
    matrices = [w for w in policy.model.base_model.parameters() if w.dim() == 2 and w is not E]
    size = 2 if policy.mixed else E.itemsize
    return min(gather(max(1, int(free / sum(sum(w.shape) * size for w in matrices)))))


def round_by_chance(x: Tensor) -> Tensor:
    """fp32 to bf16, up or down with the chances that make the mean right: [..] -> [..].

    bf16 is the upper half of an fp32: add a random lower half, and cut the lower half off."""
    bits = x.view(torch.int32) + torch.randint_like(x, 1 << 16, dtype=torch.int32)
    return (bits & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


class AdamW16(torch.optim.AdamW):
    """AdamW for bf16 weights: computed in fp32, weights and moments rounded by chance to bf16.

    Rounded to nearest, a step of 1e-5 would leave nearly every weight of 0.01 as it was."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update weights that have a gradient, a chunk at a time: few fp32 copies live at once."""
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        for w in (w for w in group["params"] if w.grad is not None):
            state = self.state[w]
            tensors = (w, state["exp_avg"], state["exp_avg_sq"], w.grad)
            for *rounded, grad in zip(*(own_share(x).view(-1).split(CHUNK) for x in tensors)):
                exact, m, v = (x.float() for x in rounded)
                adamw([exact], [grad.float()], [m], [v], [], [state["step"].clone()],
                      beta1=beta1, beta2=beta2, lr=group["lr"], eps=group["eps"], weight_decay=0.0,
                      amsgrad=False, maximize=False)
                for old, new in zip(rounded, (exact, m, v)):
                    old.copy_(round_by_chance(new))
            state["step"] += 1


# ---- 12. Files and pictures ---------------------------------------------------------------------
# Whatever is written is there as a whole or not at all. shadow() and plot_curves() show a run.

WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0, in main memory


def write(path: Path, save: Callable[[Path], object]) -> None:
    """On rank 0: save(a name) that is renamed to path once all is on the disk; else path stays."""
    if RANK > 0:
        return
    part, old = path.with_name(path.name + ".part"), path.with_name(path.name + ".old")
    with explained((OSError, RuntimeError, SafetensorError), f"{path}: can't be written"):
        shutil.rmtree(part, ignore_errors=True)
        save(part)
        for file in [file for file in part.rglob("*") if file.is_file()] or [part]:
            with open(file, "r+b") as written:  # Windows syncs only what may be written
                os.fsync(written.fileno())
        if part.is_dir() and path.exists():  # a folder can't be renamed to one that has files
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content) -> None:
    """Write JSON, all of it or nothing."""
    text = json.dumps(content, indent=1) + "\n"
    write(path, lambda part: part.write_text(text, encoding="utf-8"))


def append_jsonl(path: Path, row: dict) -> None:
    """Add one object as one line, in one piece."""
    if RANK == 0:
        with explained(OSError, f"{path}: can't be written"), open(path, "ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")


def read_log(path: Path, last: float = math.inf) -> list[dict]:
    """The objects of a log; what is of a later step, or cut short by a kill, leaves the file."""
    text = path.read_bytes() if path.exists() else b""
    rows = [row for row in map(json.loads, text.split(b"\n")[:-1]) if row.get("step", 0) <= last]
    kept = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if kept != text:
        write(path, lambda part: part.write_bytes(kept))
    return rows


def save_state(path: Path, policy: Policy, optimizer, step: int, best: float) -> None:
    """Save all that --resume needs; data order, noise, learning rate follow from the step."""
    model, moments = states.get_state_dict(policy.model, optimizer, options=WHOLE)
    state = {"model": model, "optimizer": moments, "step": step, "best": best}
    write(path, partial(torch.save, state))


def load_state(path: Path, policy: Policy, optimizer) -> tuple[int, float]:
    """Put a saved state back; return the step it was saved after and the best score till then."""
    with explained((KeyError, RuntimeError), f"{path} is damaged, or of another softcot.py"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # not at once
        states.set_state_dict(policy.model, optimizer, model_state_dict=state["model"],
                              optim_state_dict=state["optimizer"], options=WHOLE)
    for moments in optimizer.state.values():  # no longer parts of the file, which will be replaced
        moments.update({name: x.clone() for name, x in moments.items()})
    return state["step"], state["best"]


@torch.no_grad()
def shadow(policy: Policy, r: Rollout, n: int) -> list:
    """Row n's soft CoT, to be read: the text of each position's likeliest token.

    Where that is less than 0.9 of the mixture: [it, its share, the second likeliest, its share].
    Mixtures are made again from the stored inputs, as in the loss: no rollout keeps them."""
    prompt = policy.embeddings()[r.prompt_ids[n][r.prompt_mask[n]]]  # [P, D]
    x = torch.cat([prompt, r.cot.x[n][r.cot.mask[n]]])[None]  # [1, P+T, D]
    with policy.arithmetic():
        hidden = policy.model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state[0]
    logits = policy.head(hidden[len(prompt) - 1 : -1])  # [P+T, H] -> [T, V]
    shares, tokens = torch.softmax(logits / r.setting.tau, dim=-1).topk(2)  # [T, 2] each
    text = lambda token: policy.piece(token) or str(policy.tokenizer.convert_ids_to_tokens(token))
    return [text(a) if p >= 0.9 else [text(a), round(p, 2), text(b), round(q, 2)]
            for (a, b), (p, q) in zip(tokens.tolist(), shares.tolist())]  # fmt: skip


COLORS = {"base": "#7f7f7f", "hard": "#0072b2", "soft": "#d55e00", "fuzzy": "#009e73"}


def plot_curves(rows: list[dict], cot: str, path: Path) -> None:
    """Draw what to look at first when a run does not learn, from the lines of metrics.jsonl."""
    width = max(1, len(rows) // 20)
    panels = {"success": "success rate", "cot_len": "CoT length (tokens)"}
    panels |= {"cot_entropy": "CoT entropy (nats)", "mixed_groups": "groups with mixed rewards"}
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, panels.items()):
        values = [row[key] for row in rows]
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(range(1, len(rows) + 1), values, color=COLORS[cot], alpha=0.25)
        axes.plot(range(width, len(rows) + 1), smooth, color=COLORS[cot])
        axes.set(xlabel="step", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.suptitle(f"{cot} training, sampled as {cot}_sample; thick line: mean of {width} steps")
    figure.savefig(path, dpi=110, format="png")


# ---- 13. Several processes: torchrun ------------------------------------------------------------
# The same program in several processes, each with its share of the rows of every batch. FSDP2
# splits weights, gradients and moments over them; for sampling the weights are whole in each. All
# go through the same steps, so none waits for another in vain; rank 0 alone writes and speaks.

RANK = int(os.environ.get("RANK", 0))  # the number of this process; 0 without torchrun
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # how many torchrun started


def gather(x) -> list:
    """What each process gives, in all of them."""
    every = [x] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(every, x)
    return every


def own_share(x: Tensor) -> Tensor:
    """What this process has of a tensor that FSDP2 may have split."""
    return x.to_local() if isinstance(x, DTensor) else x


def progress(what: str, items, unit: str) -> tqdm:
    """A bar for what may take long: shown after five seconds, and by one process alone."""
    return tqdm(items, desc=what, unit=unit, leave=False, delay=5, disable=RANK > 0)


def join() -> None:
    """Join the other processes that torchrun started; rank 0 alone is heard on the screen."""
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(local < gpus, f"torchrun started more processes than the {gpus} GPUs there are")
        torch.cuda.set_device(local)  # what "cuda" means from now on
    dist.init_process_group(timeout=datetime.timedelta(hours=2))
    # a thread of gloo's that still holds a tensor as Python ends would abort it: pytorch#179291
    atexit.register(dist.destroy_process_group)
    atexit.register(gc.collect)  # comes before the other one: the last in is the first out
    if RANK:
        sys.stdout = open(os.devnull, "w")


def shard(policy: Policy, config: Config) -> Policy:
    """Split the policy over the processes: each layer, then what is outside of layers."""
    require(config.samples >= PROCESSES, "--samples is too small: each process needs one")
    mesh = dist.init_device_mesh(policy.model.device.type, (PROCESSES,))
    for module in policy.model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fsdp.fully_shard(module, mesh=mesh)
    fsdp.fully_shard(policy.model, mesh=mesh, reshard_after_forward=True)
    policy.model.call = policy.call
    fsdp.register_fsdp_forward_method(policy.model, "call")  # gathers weights, sees the backward
    policy.call = policy.model.call
    policy.call(lambda: None)  # FSDP2 takes what is called first for the whole model
    return policy


@contextmanager
def whole_weights(policy: Policy):
    """Within, every process has all weights."""
    shards = [m for m in policy.model.modules() if isinstance(m, fsdp.FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in shards:
        module.reshard()
        module.set_reshard_after_forward(True, recurse=False)
    if shards:
        policy.engine = None  # it knows the weights by their place, and FSDP2 moves them


# ---- 14. Mistakes and signals -------------------------------------------------------------------
# A mistake of the user's ends in one line, a signal at the next good moment.

class UserError(Exception):
    """A mistake of the caller's; main() prints its one line of explanation, not a traceback."""


class Stopped(Exception):
    """SIGINT or SIGTERM came, and what had been done by then is saved."""


def require(ok: bool, message: str) -> None:
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)


@contextmanager
def explained(errors, message: str):
    """Turn one of these errors, which a user can cause, into UserError: message (first line)."""
    try:
        yield
    except errors as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{message} ({reason})") from error


SIGNALS = []  # that came while a run was at work; looked at after each step and batch of evaluation


def note_signal(number: int, _) -> None:
    """Note SIGINT or SIGTERM for later; a second one ends the program at once."""
    SIGNALS.append(number)
    if len(SIGNALS) > 1 and PROCESSES == 1:  # torchrun hands each on more than once
        raise KeyboardInterrupt


# ---- 15. Configuration and main -----------------------------------------------------------------
# One flag a field; what is left out is filled in from the task, the mode and the machine.

THREADS = torch.get_num_threads()  # before a run of a notebook's sets another number


def option(default, text: str, **how):
    """A Config field: its default, the text of --help, and what else argparse is to know."""
    return dataclasses.field(default=default, metadata={"help": text, **how})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; None stands for the default of the task or mode."""

    model: str = option(None, "hub id or folder of a causal LM (default: toy)")
    task: str = option("toy", "toy | gsm8k | math | deepscaler | FILE.jsonl with question, answer")
    cot: str = option("soft", "the CoT of training", choices=("soft", "fuzzy", "hard"))
    steps: int = option(None, "gradient steps, one rollout each")
    prompts: int = option(None, "B: prompts a step")
    samples: int = option(None, "G: samples of each prompt")
    max_cot: int = option(None, "longest CoT in tokens, in training")
    max_answer: int = option(None, "longest answer in tokens")
    eval_max_cot: int = option(None, "longest CoT in tokens, in evaluation")
    lr: float = option(None, "peak learning rate of AdamW")
    warmup: int = option(20, "steps of linear warm-up before the cosine decay")
    tau: float = option(None, "temperature of the CoT's token distribution")
    sigma_scale: float = option(None, "noise, in units of the RMS of E")
    seed: int = option(0, "seed of data order, noise and sampling")
    out_dir: str = option(None, "where results go (default: runs/TASK-MODEL-COT-sSEED)")
    data_dir: str = option(None, "folder with TASK/train.jsonl and TASK/test.jsonl")
    resume: bool = option(False, "continue the run in --out-dir from its last saved state")
    eval_only: bool = option(False, "evaluate --model, train nothing")
    eval_tasks: list[str] = option(None, "also math500 olympiadbench FILE.jsonl")
    eval_settings: list[str] = option(tuple(SETTINGS), "of these (default: all)", choices=SETTINGS)
    eval_k: int = option(None, "samples a problem in evaluation, for pass@k")
    eval_limit: int = option(None, "test problems to evaluate; 0 skips all evaluation")
    micro_batch: int = option(None, "tokens in one backward pass (default: as memory allows)")
    dtype: str = option(None, "weights and arithmetic; bf16-mixed: fp32 weights, bf16 arithmetic",
                        choices=("fp32", "bf16-mixed", "bf16"))
    device: str = option(None, "cuda, mps, cpu (default: the first there is; toy: cpu)")
    threads: int = option(None, "CPU threads (default: 1 for the toy, else PyTorch's)")

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is int:
                low = {"samples": 2, "warmup": 0, "seed": 0, "eval_limit": 0}.get(name, 1)
                require(low <= value < 2**31, f"{flag(name)} {value}: give {low} to {2**31 - 1}")
            if type(value) is float:
                require(0 < value < math.inf, f"{flag(name)} {value}: give a positive number")
        task = f"--task {self.task}"
        require(self.eval_only or task_named(self.task).train, f"{task} is only for --eval-only")
        require(self.task == "toy" or self.model, f"{task} needs --model, a hub id or a folder")
        require(self.eval_limit != 0 or not self.eval_only, "--eval-limit 0: nothing to evaluate")
        require(self.cot != "hard" or not self.sigma_scale, "--cot hard has no --sigma-scale")


def flag(name: str) -> str:
    """The command-line flag of a Config field."""
    return "--" + name.replace("_", "-")


def settings_of(config: Config) -> dict[str, Setting]:
    """SETTINGS, but --tau and --sigma-scale change the rows of the mode --cot."""
    cot, tau, noise = config.cot, config.tau, config.sigma_scale or 0.0
    greedy = Setting(cot, 0.0 if cot == "hard" else tau, 0.0)
    return SETTINGS | {f"{cot}_greedy": greedy, f"{cot}_sample": Setting(cot, tau, noise)}


def filled(config: Config) -> Config:
    """Config with the defaults of task, mode and machine for None."""
    task = task_named(config.task)
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    fastest = "cuda" if torch.cuda.is_available() else mps
    device = config.device or (fastest if config.model else "cpu")  # the toy is too small to gain
    with explained((RuntimeError, AssertionError), f"--device {device} can't be used here"):
        torch.empty(0, device=device)
    cuda = device.startswith("cuda")
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 emulates it
    slow = f"--dtype {config.dtype}: this GPU has no bf16; leave it out, fp32 is taken then"
    require(not cuda or bf16 or "bf16" not in str(config.dtype), slow)
    mode = SETTINGS[f"{config.cot}_sample"]
    path = Path(config.model or "")  # without a name for the toy
    model = path.parent.name if path.name == "model" else path.name
    end = "eval" if config.eval_only else f"{config.cot}-s{config.seed}"
    folder = "-".join(part for part in (Path(config.task).stem, model, end) if part)
    defaults = {
        **task.defaults,
        "eval_max_cot": config.max_cot or task.defaults["eval_max_cot"],
        **{"lr": lr for name, lr in PAPER_LR.items() if name in (config.model or "").lower()},
        "tau": 0.1 if (config.task, config.cot) == ("toy", "fuzzy") else mode.tau,  # learns surely
        "sigma_scale": mode.noise or None,
        "eval_tasks": [task.test_on or config.task],
        "out_dir": f"runs/{folder}",
        "device": device,
        "dtype": "bf16-mixed" if bf16 else "fp32",
        # threads wait for each other: for so small a model two are slower on a busy machine
        "threads": 1 if config.model is None else THREADS,
    }
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def parse(arguments: list[str]) -> Config:
    """Config from command-line arguments; UserError on an unknown flag or a bad value."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.error = partial(require, False)  # argparse's own prints the usage and exits
    by_type = {"str": {}, "bool": {"action": "store_true"}, "list[str]": {"nargs": "+"}}
    by_type |= {"int": {"type": int}, "float": {"type": float}}
    for field in dataclasses.fields(Config):
        how = by_type[field.type] | field.metadata
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, **how)
    return Config(**vars(parser.parse_args(arguments)))


def check_folder(config: Config, out: Path) -> None:
    """UserError unless --out-dir is new, or --resume goes on with what was started there."""
    there = out / "config.json"
    inside = config.model and Path(config.model).resolve() in out.resolve().parents
    require(not inside, f"--out-dir {out} is in the folder of --model: name another one")
    if not config.resume:
        ways = "--resume goes on with a run, another --out-dir starts a new one"
        require(not out.is_dir() or not any(out.iterdir()), f"--out-dir {out} is not empty: {ways}")
        return
    require(there.is_file(), f"--resume: {out} holds no run; leave --resume out")
    old, new = json.loads(there.read_bytes()), dataclasses.asdict(config)
    free = "resume out_dir eval_tasks eval_settings micro_batch threads device".split()
    changed = [flag(k) for k in new if k not in free and new[k] != old.get(k)]
    require(not changed, f"--resume: {out} was started with another {' '.join(changed)}")


def check_disk(policy: Policy, out: Path) -> None:
    """Say what a run will write at most, if it is much; UserError if the disk has less."""
    most = 8 * sum(w.nbytes for w in policy.model.parameters())  # old, new: 1 model, 3 in a state
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    size = f"{out} will take up to {most / 2**30:.1f} GiB of {free / 2**30:.1f} that are free"
    require(most < free, f"{size}: name another --out-dir")
    if most > 2**30:
        print(size)


def noise_advice(config: Config, figures: dict[str, float]) -> str:
    """What the noise costs the base, and whether that is too little or too much; or nothing."""
    names = [f"{config.eval_tasks[0]} {config.cot}_{kind} pass@1" for kind in ("greedy", "sample")]
    if config.cot == "hard" or not all(name in figures for name in names):
        return ""
    without, with_noise = (figures[name] for name in names)
    text = f"noise {config.sigma_scale:g}: success {with_noise:.3f}, without it {without:.3f}"
    if with_noise > 0.85 * without:  # both limits were measured: see results/README.md
        text += ": perhaps too little to explore; see mixed_groups, or raise --sigma-scale"
    if with_noise < 0.01:
        text += ": too much to find what is right; try a lower --sigma-scale"
    return text


def run(config: Config) -> str:
    """What the program does; returns its last line."""
    given, config = vars(config), filled(config)
    new = {name: value for name, value in vars(config).items() if value != given[name]}
    text = lambda value: " ".join(value) if isinstance(value, list) else value
    print("filled in:", *(f"{flag(name)} {text(value)}" for name, value in new.items()))
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.device == "cpu")  # same seed, same bits
    out = Path(config.out_dir)
    check_folder(config, out)
    gather(None)  # all processes have looked before one of them writes
    source = config.model
    if source is None:
        import toy_tasks
        source = str(toy_tasks.base_model(Path("runs/toy-base")))
    policy = load_policy(config, source)
    problems, held_out, tests = load_data(policy, config)  # finds mistakes before a file is touched
    if not (config.eval_only or config.resume):
        check_disk(policy, out)
    with explained(OSError, f"--out-dir {out}: can't be made"):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", dataclasses.asdict(config) | {"resume": False})
    if __name__ == "__main__":  # in a notebook an interrupt is an ordinary one
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note_signal)
    before = evaluate_all(policy, config, tests, "base")
    if config.eval_only:
        return f"Evaluated {config.model or 'the toy base'}: {out}/eval.json"
    print(noise_advice(config, before))
    train(policy, config, out, problems, held_out)
    last = f"after {config.steps} steps of {config.cot} training: model in {out}/model"
    if not tests:
        return f"Not evaluated {last}"
    del policy
    gc.collect()  # of the model that was trained, before the best one is loaded
    policy = load_policy(config, str(out / "model"))
    after = evaluate_all(policy, config, tests, "trained")
    name = next(iter(before))
    return f"{name} {before[name]:.3f} -> {after[name]:.3f} {last}, figures and tables in {out}"


def main(arguments: list[str]) -> int:
    """Parse, run, and turn a user's mistake into one line and exit status 2, a signal into 0."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if PROCESSES > 1 and not dist.is_initialized():
            join()
        with explained(torch.OutOfMemoryError, "out of GPU memory: try --dtype bf16, more GPUs"):
            print(run(parse(arguments)))
    except UserError as error:
        if os.environ.get("SOFTCOT_DEBUG"):  # mistakes have their tracebacks then
            raise
        who = f"process {RANK}" if RANK else "softcot.py: error"
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    except Stopped:
        again = [] if "--resume" in arguments else ["--resume"]
        start = f"torchrun --nproc-per-node {PROCESSES}" if PROCESSES > 1 else "python"
        print("Stopped. To go on:", start, shlex.join(["softcot.py", *arguments, *again]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("Stopped at once; a run goes on from its last saved state with --resume")
