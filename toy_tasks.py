"""The toy: a small language model that adds six numbers step by step, with one bad habit.

    3+1+5+2+4+2=4 9 11 15 17 The final answer is: \\boxed{17}

Its chain of thought (CoT) is the running totals. It was pretrained on CoTs that often stop early
and box the last total they have, most often after a multiple of five, as if a round number had to
be the end. To stop there is a close call for the model (54 to 46), elsewhere it rather goes on (30
to 70): so noise can tip the balance, and reinforcement learning can find out that thinking longer
pays.

It was pretrained on three more kinds of text, which reinforcement learning never sees:

    toy-large   sums of larger numbers, with the same habit: does the lesson carry over?
    toy-round   `3+1+5+2+4+2 to a round total=4 9 11 15 The final answer is: \\boxed{15}`: here one
                should stop at the first total that is a multiple of five (if there is none, at the
                end). It was pretrained to stop after such totals in 75 % of cases, after others
                in 10 %: is a skill kept that the lesson, always to go on, contradicts?
    toy-walk    random walks, `9 10 9 8 =7 8 9 8`, each number one more or one less with equal
                chance: is a skill kept that has nothing to do with sums? results/choices.py
                asks. (Nobody can do better than ln 2 = 0.693 nats a number.)

The model is a one-layer Llama with a real `transformers` tokenizer, so that it runs through the
same code as a model of 8B.
Two things make it behave like a large pretrained one under soft tokens: some noise on its input
embeddings in pretraining, and embeddings that are small beside its other weights (a step of Adam
has one size for all weights, so small ones learn most from the noise put on them).
"""

import itertools
import math
import os
import shutil
from functools import cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

TERMS = 6  # numbers in a sum
LARGEST = {"toy": 5, "toy-large": 8, "toy-round": 5}  # of these numbers
EQUALS = {"toy": "=", "toy-large": "=", "toy-round": " to a round total="}  # end of a question
TEST, TRAIN = 256, 2048  # problems
GIVEN, ASKED = 4, 4  # numbers of a walk in the question and in the answer
JUMP = 5  # somewhere in a wrong answer
STEPS, PEAK_LR = 800, 6e-3  # pretraining
WIDTH = 64  # of the model: D, the length of an embedding
BATCH = {"toy": 144, "toy-large": 72, "toy-round": 48, "toy-walk": 24}  # of each kind of text
NOISE = 0.1  # largest noise on the embeddings in pretraining, in units of their RMS
EMBEDDING_RMS = 0.005
# Chance to stop after a total that is, is not, a multiple of 5
STOP = {"toy": (0.54, 0.30), "toy-large": (0.54, 0.30), "toy-round": (0.75, 0.10)}


def all_sums(name: str) -> Tensor:
    """Every sum of a kind in an order that is always the same [number, TERMS], int64.

    Those of "toy-large" have a number that is too large for "toy"; "toy-round" has those of "toy",
    in the same order. The first TEST are for testing, the next TRAIN of "toy" for reinforcement
    learning; pretraining draws from all but the first TEST.
    """
    sums = torch.cartesian_prod(*[torch.arange(1, LARGEST[name] + 1)] * TERMS)
    if name == "toy-large":
        sums = sums[(sums > LARGEST["toy"]).any(dim=1)]
    return sums[torch.randperm(len(sums), generator=torch.Generator().manual_seed(0))]


@cache
def pool(name: str) -> Tensor:
    """The sums that pretraining draws from [number, TERMS]."""
    return all_sums(name)[TEST:]


def walks(count: int, generator: torch.Generator) -> Tensor:
    """Random walks [count, GIVEN + ASKED] of numbers in 1 .. 39, int64."""
    length = GIVEN + ASKED
    first = torch.randint(length, 41 - length, (count, 1), generator=generator)
    steps = 2 * torch.randint(2, (count, length - 1), generator=generator) - 1
    return torch.cat([first, first + steps.cumsum(1)], dim=1)


def answer(name: str, terms: list[int]) -> int:
    """The total asked for: in toy-round the first multiple of 5, if there is one, else the last."""
    totals = list(itertools.accumulate(terms))[1:]
    multiples = [total for total in totals if name == "toy-round" and total % 5 == 0]
    return (multiples or totals[-1:])[0]


def rows(name: str, split: str) -> list[dict]:
    """The rows of a kind as a data set: "train" ("toy" alone) or "test"."""
    if name in LARGEST:
        chosen = all_sums(name)[:TEST] if split == "test" else all_sums(name)[TEST : TEST + TRAIN]
        found = []
        for terms in chosen.tolist():
            question = "+".join(map(str, terms)) + EQUALS[name]
            found.append({"question": question, "answer": str(answer(name, terms))})
        return found
    generator = torch.Generator().manual_seed(1)
    right, found = walks(TEST, generator), []
    for row, place in zip(right.tolist(), torch.randint(ASKED, (TEST,), generator=generator)):
        options = [row[GIVEN:], row[GIVEN:]]
        options[1] = [n + JUMP * (i >= place) for i, n in enumerate(options[1])]
        question, *options = ("".join(f"{n} " for n in part) for part in (row[:GIVEN], *options))
        found.append({"question": question + "=", "options": options, "answer": 0})
    return found


def make_tokenizer(unused: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: `3`, `+5`, `=`, `17 ` (a total of the CoT), the stop phrase.

    unused: so many more words, which no text uses."""
    largest = max(LARGEST.values())
    numbers = [str(i) for i in range(TERMS * largest + 1)]
    words = ["<pad>", "<eos>", "<unk>", *sorted(set(EQUALS.values()))]
    words += ["The final answer is:", " \\boxed{", "}"]
    words += [f"+{i}" for i in range(1, largest + 1)] + numbers + [n + " " for n in numbers]
    words += [f"<unused{i}>" for i in range(unused)]
    split = Regex(r" to a round total=|The final answer is:| \\boxed\{|[0-9]+ (?!\\)|[+]?[0-9]+|.")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(split, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def sum_texts(
    name: str, terms: Tensor, vocab: dict[str, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Token ids [N, L] of sums with CoTs and answers, and labels: -100 on question and padding.

    terms [N, n]. A CoT breaks off after a total with the probabilities of STOP; the answer is then
    that total. L = n + 1 tokens of question, n - 1 totals, 5 tokens of answer.
    """
    N, n = terms.shape
    totals = terms.cumsum(1)[:, 1:]  # [N, n-1]
    chance = torch.where(totals % 5 == 0, *STOP[name])
    stop = torch.rand(totals.shape, generator=generator) < chance
    stop[:, -1] = True
    last = stop.int().argmax(1, keepdim=True)  # [N, 1] where the CoT ends
    ending = torch.cat(
        [
            torch.tensor([[vocab["The final answer is:"], vocab[" \\boxed{"]]]).expand(N, 2),
            vocab["0"] + totals.gather(1, last),
            torch.tensor([[vocab["}"], vocab["<eos>"]]]).expand(N, 2),
        ],
        dim=1,
    )  # [N, 5]
    column = torch.arange(n - 1 + 5)[None]  # of the part behind the question
    thought = torch.cat([vocab["0 "] + totals, torch.zeros_like(ending)], dim=1)
    written = ending.gather(1, (column - last - 1).clamp(0, 4))
    reply = torch.where(column <= last, thought, written)
    reply = torch.where(column <= last + 5, reply, vocab["<pad>"])
    equals = torch.full((N, 1), vocab[EQUALS[name]])
    question = torch.cat([vocab["0"] + terms[:, :1], vocab["+1"] - 1 + terms[:, 1:], equals], dim=1)
    labels = torch.where(column <= last + 5, reply, -100)
    return torch.cat([question, reply], 1), torch.cat([torch.full_like(question, -100), labels], 1)


def walk_texts(
    count: int, vocab: dict[str, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Token ids [count, L] of random walks, and labels: -100 on the question."""
    numbers = vocab["0 "] + walks(count, generator)
    question = torch.cat([numbers[:, :GIVEN], torch.full((count, 1), vocab["="])], dim=1)
    ids = torch.cat([question, numbers[:, GIVEN:]], dim=1)
    return ids, torch.cat([torch.full_like(question, -100), numbers[:, GIVEN:]], dim=1)


def pretraining_batch(vocab: dict[str, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids [N, L] of texts of all kinds, as many as BATCH says, and labels: -100 on what is
    not to be learnt, questions and padding."""
    kinds = []
    for name in LARGEST:
        sums = pool(name)
        chosen = torch.randint(len(sums), (BATCH[name],), generator=generator)
        kinds.append(sum_texts(name, sums[chosen], vocab, generator))
    kinds.append(walk_texts(BATCH["toy-walk"], vocab, generator))
    longest = max(ids.shape[1] for ids, _ in kinds)
    pad = nn.functional.pad
    ids = torch.cat(
        [pad(ids, (0, longest - ids.shape[1]), value=vocab["<pad>"]) for ids, _ in kinds]
    )
    labels = [pad(labels, (0, longest - labels.shape[1]), value=-100) for _, labels in kinds]
    return ids, torch.cat(labels)


def pretrain(
    seed: int = 0, unused: int = 0, width: int = WIDTH
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train the base model from scratch on CoTs with the habit: next-token loss, noisy embeddings.

    unused: words of its vocabulary that no text uses. width: D; a wider one takes smaller steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_tokenizer(unused)
    vocab = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=vocab["<eos>"],
        pad_token_id=vocab["<pad>"],
    )
    model = LlamaForCausalLM(config)
    # Adam's steps are of one size whatever the weights': learn large embeddings, use them scaled.
    large = nn.Parameter(torch.randn(len(vocab), config.hidden_size))
    weights = [w for name, w in model.named_parameters() if "embed_tokens" not in name] + [large]
    peak = PEAK_LR * min(1, (WIDTH / width) ** 0.5)
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * i / STEPS))
    )
    for _ in tqdm(range(STEPS), desc="pretraining the toy"):
        ids, labels = pretraining_batch(vocab, generator)
        E = EMBEDDING_RMS * large
        noise = NOISE * torch.rand(len(ids), 1, 1, generator=generator)  # one strength a sequence
        eps = torch.randn(*ids.shape, E.shape[1], generator=generator)
        inputs = nn.functional.embedding(ids, E) + noise * E.detach().square().mean().sqrt() * eps
        logits = model(inputs_embeds=inputs, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(EMBEDDING_RMS * large)
    return model.eval(), tokenizer


def base_model(folder: Path) -> Path:
    """The folder of the pretrained toy; pretrains and saves it (under a minute) the first time."""
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        if fcntl:  # one pretrains, the others wait; where it is missing, all pretrain the same
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            model, tokenizer = pretrain()
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            os.replace(part, folder)  # a run that is stopped halfway leaves no half model
    return folder
