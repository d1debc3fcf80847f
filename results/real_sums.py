"""A real model for the toy's task: a pretrained one, fine-tuned to add as the toy does, bad habit included.

    python results/real_sums.py MODEL FOLDER   # SmolLM2-135M: 100 steps, half an hour on 2 CPU cores

FOLDER is then a model for `softcot.py --model FOLDER --task toy`: the network, the tokenizer and the embeddings
are MODEL's, the CoT is short enough for a CPU, and it is known what there is to learn (see toy_tasks.py).
"""

import itertools
import random
import sys

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, __file__.rpartition("results")[0])
import toy_tasks

STEPS, BATCH, LR, WARMUP = 100, 48, 3e-4, 10


def text(terms: list[int], rng: random.Random) -> tuple[str, str]:
    """A sum, and a reply that breaks off after a total with the probabilities of the toy's habit."""
    totals = list(itertools.accumulate(terms))[1:]
    for i, total in enumerate(totals, 1):
        if i == len(totals) or rng.random() < toy_tasks.STOP["toy"][total % 5 > 0]:
            break
    thought = " ".join(map(str, totals[:i]))
    return "+".join(map(str, terms)) + "=", f"{thought} The final answer is: \\boxed{{{total}}}"


def main(source: str, folder: str) -> None:
    """Fine-tune all weights on replies; the test problems are not among the sums."""
    torch.manual_seed(0)
    rng, sums = random.Random(0), toy_tasks.pool("toy").tolist()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.0)
    bar = tqdm(range(STEPS))
    for step in bar:
        rows, labels = [], []
        for question, reply in [text(rng.choice(sums), rng) for _ in range(BATCH)]:
            asked = tokenizer(question).input_ids
            said = tokenizer(reply, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            rows.append(torch.tensor(asked + said))
            labels.append(torch.tensor([-100] * len(asked) + said))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # behind the text: nothing attends to it
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / WARMUP, 1, 2 * (1 - step / STEPS))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=round(loss.item(), 3))
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
