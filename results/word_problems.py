"""Word problems of one or two steps that a model of 0.5B solves about half of the time.

    python results/word_problems.py FOLDER   # writes FOLDER/word_problems.jsonl, 2,000 of them

A file for `--task FOLDER/word_problems.jsonl --max-cot 96`: for measurements on a CPU, where GSM8K takes too long.
"""

import json
import random
import sys
from pathlib import Path

NAMES = "Ana Ben Carla Daniel Emma Felix Grace Hugo Iris Jonas Karin Leo Mia Noah Olga Paul".split()
THINGS = "coins cards pens stamps marbles books apples stickers".split()
BOXES = "bags boxes packs jars".split()


def problem(rng: random.Random) -> dict:
    """One of four kinds, with numbers of at most two digits."""
    name, thing, box = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    have, more, few = rng.randint(20, 80), rng.randint(5, 40), rng.randint(2, 9)
    kinds = [
        (f"{name} has {have} {thing} and finds {more} more. How many {thing} does {name} have now?", have + more),
        (f"{name} had {have} {thing}, bought {more} and lost {few}. How many {thing} are left?", have + more - few),
        (f"{name} has {few} {box} of {more} {thing}. How many {thing} are there?", few * more),
        (f"{name} had {have} {thing} and gave {few} to a friend. How many {thing} are left?", have - few),
    ]
    question, answer = rng.choice(kinds)
    return {"question": question, "answer": str(answer)}


def main(folder: Path) -> None:
    """Always the same problems."""
    rng, rows = random.Random(0), {}
    while len(rows) < 2000:
        row = problem(rng)
        rows[row["question"]] = row
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows.values())
    (folder / "word_problems.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
