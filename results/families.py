"""Which families of models can be trained? Every decoder of transformers, tiny and random.

    python results/families.py           # prints Markdown; a few minutes on a CPU

Builds a model of each family in the table of AutoModelForCausalLM with a few layers and the toy's
tokenizer, saves it, and loads it with load_policy(), which checks what the method needs. A family
that these sizes can't build is named apart: it may work.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import softcot
import toy_tasks

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, sliding_window=64)  # fmt: skip
OTHER_NAMES = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, d_model=32, n_layers=2, n_heads=4,
                   ffn_dim=48, word_embed_proj_dim=32, dff=48, decoder_layers=2, decoder_ffn_dim=48,
                   decoder_attention_heads=4)  # fmt: skip
ALL = dict(max_position_embeddings=128, initializer_range=0.3, eos_token_id=1, pad_token_id=0,
           bos_token_id=None)  # fmt: skip
CHOICES = ({**SIZES, **OTHER_NAMES}, SIZES, {k: v for k, v in SIZES.items() if k != "head_dim"},
           {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}, OTHER_NAMES)  # fmt: skip
LARGEST = 20_000_000  # parameters: a configuration that ignored these sizes is not built


def built(kind, vocabulary: int):
    """A tiny model of a configuration class, or None."""
    for sizes in CHOICES:
        try:
            torch.manual_seed(0)
            config = kind(**sizes, **ALL, vocab_size=vocabulary)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
            if sum(w.numel() for w in model.parameters()) < LARGEST:
                return transformers.AutoModelForCausalLM.from_config(config)
        except Exception:  # other names of sizes may do
            continue
    return None


def verdict(kind) -> tuple[str, str]:
    """"works", "refused" or "not built", and why."""
    tokenizer = toy_tasks.make_tokenizer()
    model = built(kind, len(tokenizer))
    if model is None:
        return "not built", ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except Exception as error:
            return "not built", str(error)
        config = softcot.filled(softcot.Config(model=folder, device="cpu"))
        try:  # the toy's tokenizer is in no family's own format (Qwen2 reads it as an empty one)
            with patch.object(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer):
                policy = softcot.load_policy(config, folder)
        except softcot.UserError as error:
            return "refused", str(error).partition(" (")[2].removesuffix(")")
    return "works", "" if policy.logit_scale == 1 else "logits are scaled"


def main(names: list[str]) -> None:
    """The table: families that work, and those that are refused with the reason."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    found = {"works": [], "refused": [], "not built": []}
    silent = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what some configurations say of these sizes
    for kind, _ in transformers.MODEL_FOR_CAUSAL_LM_MAPPING.items():
        name = kind.__name__.removesuffix("Config")
        if not names or name in names:
            what, why = verdict(kind)
            found[what].append((name, why))
            print(f"{name}: {what} {why}", flush=True)
    os.dup2(silent, 2)
    print(f"\ntransformers {transformers.__version__}, {sum(map(len, found.values()))} families\n")
    print("| | families |\n|---|---|")
    print(f"| work | {', '.join(name for name, _ in found['works'])} |")
    reasons = {}
    for name, why in found["refused"]:
        reasons.setdefault(why[:60], []).append(name)
    for why, some in reasons.items():
        print(f"| refused: {why} | {', '.join(some)} |")
    print(f"| not built | {', '.join(name for name, _ in found['not built'])} |")


if __name__ == "__main__":
    main(sys.argv[1:])
