"""The toy with words that no text uses, for claim 8: python results/more_words.py FOLDER

Pretrains it with 4,000 of them (about 4 minutes), and saves it with 0, 1,000, 4,000 and 16,000 as FOLDER/0,
FOLDER/1000, ...: all but the first 4,000 are copies, so that all of these are one and the same model of the sums.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import toy_tasks

PRETRAINED = 4000


def main(folder: Path) -> None:
    """Pretrain once, and save the variants."""
    torch.use_deterministic_algorithms(True)
    model, tokenizer = toy_tasks.pretrain(unused=PRETRAINED)
    used = len(tokenizer) - PRETRAINED
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [layer.weight.detach().clone() for layer in layers]
    for words in (0, 1000, 4000, 16000):
        which = torch.cat([torch.arange(used), used + torch.arange(words) % PRETRAINED])
        for layer, weight in zip(layers, weights):
            layer.weight = torch.nn.Parameter(weight[which])
        model.config.vocab_size = len(which)
        model.save_pretrained(folder / str(words))
        toy_tasks.make_tokenizer(words).save_pretrained(folder / str(words))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
