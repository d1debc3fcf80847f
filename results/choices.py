"""Multiple choice before and after training (the paper's Table 2): accuracy and likelihood.

    python results/choices.py RUN TASK [--data-dir DIR] [--limit 128]

RUN is the folder of a finished run of softcot.py, TASK one of hellaswag, mmlu, arc and toy-walk.
Prints a line for the base and one for RUN/model, and puts both into RUN/eval.json, where they
replace older ones of the task. Questions come from the hub or from DIR/TASK/SPLIT.jsonl.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import softcot
import toy_tasks
from softcot import SETTINGS, Config, Phase, Policy, Rollout, UserError, explained, require

CHOICES = {  # name and part on the hub, split, a row's question, options, index of the right one
    "hellaswag": (("Rowan/hellaswag",), "validation", lambda row: (
        row["ctx"], [" " + text for text in row["endings"]], int(row["label"]))),
    "mmlu": (("cais/mmlu", "all"), "test", lambda row: (
        f"Question: {row['question']}\nAnswer:", [" " + text for text in row["choices"]],
        int(row["answer"]))),
    "arc": (("allenai/ai2_arc", "ARC-Challenge"), "test", lambda row: (
        f"Question: {row['question']}\nAnswer:", [" " + text for text in row["choices"]["text"]],
        row["choices"]["label"].index(row["answerKey"]))),
    "toy-walk": ((), "test", lambda row: (row["question"], row["options"], row["answer"])),
}  # fmt: skip


def read_rows(name: str, data_dir: Optional[str], limit: int) -> list[dict]:
    """The first rows of a task: of the toy, of DIR/TASK/SPLIT.jsonl, or of the hub."""
    hub, split, read = CHOICES[name]
    if name == "toy-walk":
        rows = toy_tasks.rows(name, split)
    elif data_dir:
        rows = softcot.read_jsonl(Path(data_dir) / name / f"{split}.jsonl")
    else:
        import datasets  # only here: the toy and local files do without it
        advice = f"with --data-dir DIR it is read from DIR/{name}/{split}.jsonl"
        errors = (OSError, ValueError, ImportError)
        with explained(errors, f"{name}: could not load {hub[0]} from the hub; {advice}"):
            rows = datasets.load_dataset(*hub, split=split)
    rows = [row for row, _ in zip(rows, range(limit))]
    require(rows, f"{name}: there are no rows")
    for i, row in enumerate(rows, 1):
        with explained((KeyError, TypeError, ValueError), f"{name} row {i} can't be read"):
            question, options, right = read(row)
        complete = isinstance(question, str) and 0 <= right < len(options)
        require(complete, f"{name} row {i} has no text as its question, or no option {right}")
    return rows


@torch.no_grad()
def evaluate_choices(policy: Policy, name: str, rows: list[dict]) -> dict:
    """Accuracy, and negative log-likelihood per token of the right option, with standard errors.

    Teacher-forced: the log-probability of a rollout without CoT whose answer is the option. The
    model's choice is the option with the highest log-probability per token."""
    scores = {"accuracy": [], "nll": []}
    for row in softcot.progress(name, rows, "question"):
        question, options, right = CHOICES[name][2](row)
        ids, mask = policy.tokenize([question] * len(options))  # [options, P]
        option_ids, option_mask = policy.tokenize(options, begins=False)
        none = ids[:, :0]  # [options, 0]
        cot = Phase(ids=none, logp=none, entropy=none, mask=none.bool())
        answer = Phase(ids=option_ids, logp=none, entropy=none, mask=option_mask)
        r = Rollout(
            setting=SETTINGS["hard_sample"], sigma=0.0, prompt_ids=ids, prompt_mask=mask,
            prefill_ids=none, prefill_mask=none.bool(), cot=cot, answer=answer,
            stopped=[], cots=[], answers=[])
        _, logp, _ = softcot.log_probs(policy, r)
        logp = logp.sum(1) / option_mask.sum(1)  # [options] nats per token
        scores["accuracy"].append(logp.argmax().item() == right)
        scores["nll"].append(-logp[right].item())
    error = {key: float(np.std(x) / max(1, len(x) - 1) ** 0.5) for key, x in scores.items()}
    means = {key: float(np.mean(x)) for key, x in scores.items()}
    return {"problems": len(rows), **means, "error": error}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags, with the run's own values for those that are left out, and its `model`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = partial(require, False)  # argparse's own prints the usage and exits
    parser.add_argument("run", type=Path)
    parser.add_argument("task", choices=CHOICES)
    parser.add_argument("--data-dir", default=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=("fp32", "bf16-mixed", "bf16"), default=argparse.SUPPRESS)
    parser.add_argument("--device", default=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=128, help="questions")
    given = parser.parse_args(arguments)
    require(given.limit > 0, f"--limit {given.limit} is too small: give 1 or more")
    with explained((OSError, ValueError), f"{given.run} holds no run"):
        config = json.loads((given.run / "config.json").read_bytes())
    unfinished = f"{given.run} holds no trained model: is it the folder of a finished run?"
    require((given.run / "model").is_dir(), unfinished)
    own = {name: config[name] for name in ("model", "data_dir", "dtype", "device")}
    return argparse.Namespace(**own | vars(given))


def run(given: argparse.Namespace) -> None:
    """Score the base and the trained model, print a line for each, and write both down."""
    rows = read_rows(given.task, given.data_dir, given.limit)
    config = Config(model=given.model, dtype=given.dtype, device=given.device)
    config = softcot.filled(config)
    torch.set_num_threads(config.threads)
    base = given.model or str(toy_tasks.base_model(Path("runs/toy-base")))
    found = []
    for stage, source in (("base", base), ("trained", str(given.run / "model"))):
        scores = evaluate_choices(softcot.load_policy(config, source), given.task, rows)
        line = "accuracy {accuracy:.3f} +- {error[accuracy]:.3f}, {nll:.3f} +- {error[nll]:.3f}"
        print(f"{stage:8}", line.format(**scores), "nats per token of the right answer")
        key = {"stage": stage, "task": given.task, "setting": "teacher_forced"}
        found.append({**key, "model": given.model or "toy", **scores})
    path = given.run / "eval.json"
    records = json.loads(path.read_bytes()) if path.exists() else []
    kept = [row for row in records if row["task"] != given.task]
    softcot.write_json(path, kept + found)


def main(arguments: Optional[list[str]] = None) -> int:
    """Parse and run; a user's mistake is one line and exit status 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        run(parse(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        if os.environ.get("SOFTCOT_DEBUG"):
            raise
        print(f"choices.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
