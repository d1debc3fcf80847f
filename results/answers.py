"""Do the graders say what a careful human says? A table of labelled answers; a minute at most.

    python results/answers.py

answers.jsonl has an object a line: the grader ("number": GSM8K and the toy, "latex": the others), a
gold answer, an answer, whether they are equal, and, where the grader is known to be wrong, why.
What nobody can tell from the two texts is not equal: a wrong answer that is rewarded is learnt.
Sums are no numbers to the first grader: the toy could box its question. The exit status is 1 if a
pair disagrees without being known to, or agrees although it is said not to.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import softcot

GRADERS = {"number": softcot.same_number, "latex": softcot.GRADER.equal}
PAIRS = Path(__file__).with_suffix(".jsonl")


def main() -> int:
    """Grade every pair and print where the graders disagree with the labels."""
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    surprises = 0
    for name, equal in GRADERS.items():
        mine = [pair for pair in pairs if pair["grader"] == name]
        wrong = [pair for pair in mine if equal(pair["answer"], pair["gold"]) != pair["equal"]]
        print(f"{name}: {len(mine) - len(wrong)} of {len(mine)} as labelled")
        for label, title in ((False, "rewarded though wrong"), (True, "refused though right")):
            print(f"  {title}: {sum(pair['equal'] == label for pair in wrong)}")
            for pair in wrong:
                if pair["equal"] == label:
                    why = pair.get("known", "NOT KNOWN")
                    print(f"    {pair['gold']!r} and {pair['answer']!r}: {why}")
        by_now = [pair for pair in mine if "known" in pair and pair not in wrong]
        for pair in by_now:
            print(f"  AGREES BY NOW: {pair['gold']!r} and {pair['answer']!r}")
        surprises += len(by_now) + sum("known" not in pair for pair in wrong)
    return int(surprises > 0)


if __name__ == "__main__":
    sys.exit(main())
