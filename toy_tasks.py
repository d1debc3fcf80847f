"""The toy: a small language model that adds six numbers step by step, with one bad habit.

    3+1+5+2+4+2=4 9 11 15 17 The final answer is: \\boxed{17}

Its chain of thought (CoT) is the running totals. It was pretrained on CoTs that often stop early and
box the last total they have, most often after a multiple of five, as if a round number had to be
the end. To stop there is a close call for the model (54 to 46), elsewhere it rather goes on (30 to
70): so noise can tip the balance, and reinforcement learning can find out that thinking longer pays.

The model is a one-layer Llama with a real `transformers` tokenizer, so that it runs through the same
code as a model of 8B. Two things make it behave like a large pretrained one under soft tokens: some
noise on its input embeddings in pretraining, and embeddings that are small beside its other weights
(a step of Adam has one size for all weights, so small ones learn most from the noise put on them).
"""

import itertools
import math
import os
import shutil
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TERMS = 6  # numbers in a sum
LARGEST = 5  # of these numbers
TEST, TRAIN = 256, 2048  # problems
STEPS, BATCH, PEAK_LR = 700, 256, 6e-3  # pretraining
NOISE = 0.1  # largest noise on the embeddings in pretraining, in units of their RMS
EMBEDDING_RMS = 0.005
DEFAULTS = dict(steps=100, prompts=32, samples=32, max_cot=9, max_answer=3, lr=5e-5)  # of softcot
DEFAULTS |= dict(eval_max_cot=9, eval_k=32, eval_limit=128, micro_batch=2**15)
STOP_ROUND, STOP_OTHER = 0.54, 0.30  # chance to stop after a total that is, is not, a multiple of 5


def all_problems() -> Tensor:
    """Every sum there is, in an order that is always the same: [LARGEST**TERMS, TERMS], int64.

    The first TEST are for testing, the next TRAIN for reinforcement learning, and pretraining draws
    from all but the first TEST.
    """
    sums = torch.tensor(list(itertools.product(range(1, LARGEST + 1), repeat=TERMS)))
    return sums[torch.randperm(len(sums), generator=torch.Generator().manual_seed(0))]


def rows(split: str) -> list[dict]:
    """The "train" or "test" problems as question and answer, like the rows of a data set."""
    chosen = all_problems()[:TEST] if split == "test" else all_problems()[TEST : TEST + TRAIN]
    return [
        {"question": "+".join(map(str, terms)) + "=", "answer": str(sum(terms))}
        for terms in chosen.tolist()
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: `3`, `+5`, `=`, `17 ` (a total of the CoT), the stop phrase."""
    numbers = [str(i) for i in range(TERMS * LARGEST + 1)]
    words = ["<pad>", "<eos>", "<unk>", "=", "The final answer is:", " \\boxed{", "}"]
    words += [f"+{i}" for i in range(1, LARGEST + 1)] + numbers + [n + " " for n in numbers]
    split = Regex(r"The final answer is:| \\boxed\{|[0-9]+ (?!\\)|[+]?[0-9]+|.")
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


def pretraining_batch(
    terms: Tensor, vocab: dict[str, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Token ids [BATCH, L] of sums with CoTs and answers, and labels: -100 on question and padding.

    terms [BATCH, TERMS]. A CoT breaks off after a total with the probabilities above; the answer is
    then that total. L = TERMS + 1 tokens of question, TERMS - 1 totals, 5 tokens of answer.
    """
    totals = terms.cumsum(1)[:, 1:]  # [BATCH, TERMS-1]
    chance = torch.where(totals % 5 == 0, STOP_ROUND, STOP_OTHER)
    stop = torch.rand(totals.shape, generator=generator) < chance
    stop[:, -1] = True
    last = stop.int().argmax(1, keepdim=True)  # [BATCH, 1] where the CoT ends
    ending = torch.cat(
        [
            torch.tensor([[vocab["The final answer is:"], vocab[" \\boxed{"]]]).expand(len(terms), 2),
            vocab["0"] + totals.gather(1, last),
            torch.tensor([[vocab["}"], vocab["<eos>"]]]).expand(len(terms), 2),
        ],
        dim=1,
    )  # [BATCH, 5]
    column = torch.arange(TERMS - 1 + 5)[None]  # of the part behind the question
    thought = torch.cat([vocab["0 "] + totals, torch.zeros_like(ending)], dim=1)
    written = ending.gather(1, (column - last - 1).clamp(0, 4))
    reply = torch.where(column <= last, thought, written)
    reply = torch.where(column <= last + 5, reply, vocab["<pad>"])
    equals = torch.full((len(terms), 1), vocab["="])
    question = torch.cat([vocab["0"] + terms[:, :1], vocab["+1"] - 1 + terms[:, 1:], equals], dim=1)
    labels = torch.where(column <= last + 5, reply, -100)
    return torch.cat([question, reply], 1), torch.cat([torch.full_like(question, -100), labels], 1)


def pretrain(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train the base model from scratch on CoTs with the habit: next-token loss, noisy embeddings."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_tokenizer()
    vocab, pool = tokenizer.get_vocab(), all_problems()[TEST:]
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=192,
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
    optimizer = torch.optim.AdamW(weights, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * i / STEPS))
    )
    for _ in tqdm(range(STEPS), desc="pretraining the toy"):
        terms = pool[torch.randint(len(pool), (BATCH,), generator=generator)]
        ids, labels = pretraining_batch(terms, vocab, generator)
        E = EMBEDDING_RMS * large
        noise = NOISE * torch.rand(BATCH, 1, 1, generator=generator)  # one strength a sequence
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
    if not (folder / "config.json").exists():
        model, tokenizer = pretrain()
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, folder)  # a run that is stopped halfway leaves no half model
    return folder
