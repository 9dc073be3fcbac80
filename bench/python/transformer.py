"""The built-in transformer as PyTorch's users write and train it: the model of nanoGPT, without biases.

- `usual`: DistributedDataParallel as its tutorial says, Adam with its defaults.
- `tuned`: fused Adam, gradients as views of DDP's buckets, the C library told to keep freed memory; with `--compile`,
  torch.compile of the network as well.

Rank 0 prints what peer.py prints. With `--held-out` the program trains as nanoGPT's configuration for small CPUs does (AdamW,
warm-up, cosine decay, clipping) and prints bits per byte of that text, for a comparison at equal parameters and tokens:

    python3 bench/python/transformer.py --way usual --batch 12 --steps 2000 --context 64 --data data/kjv/train.txt.gz \\
        --held-out data/kjv/held-out.txt.gz
"""

import argparse
import gzip
import math
import pathlib
import time

import torch
import torch.nn.functional as F
from ddp import leave, share, tell, train, wrap
from torch import nn

VOCABULARY = 256


class Block(nn.Module):
    """Attention, then a perceptron, each added to the input: (n, tokens, width) to the same."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width, bias=False), "c_proj": nn.Linear(width, width, bias=False)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width, bias=False), "c_proj": nn.Linear(4 * width, width, bias=False)}
        )

    def forward(self, x):
        split = self.attn["c_attn"](self.ln_1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*split.unbind(0), is_causal=True)
        x = x + self.attn["c_proj"](attended.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    """Tokens (n, context + 1) to the mean of the negative log-likelihoods of all but the first."""

    def __init__(self, context, width=128, layers=4, heads=4):
        super().__init__()
        body = {"wte": nn.Embedding(VOCABULARY, width), "wpe": nn.Embedding(context, width)}
        body |= {
            "h": nn.ModuleList(Block(width, heads) for _ in range(layers)),
            "ln_f": nn.LayerNorm(width, bias=False),
        }
        self.transformer = nn.ModuleDict(body)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (2 * layers) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, 0.0, 0.02 * scale)

    def forward(self, tokens):
        body, before = self.transformer, tokens[:, :-1]
        x = body["wte"](before) + body["wpe"].weight[: before.shape[1]]
        for block in body["h"]:
            x = block(x)
        logits = body["ln_f"](x) @ body["wte"].weight.t()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def text(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()


def samples(tokens, context):
    """Pieces of fixed places, each with the first token of the next."""
    return tokens.unfold(0, context + 1, context)


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=["usual", "tuned"], required=True)
    parser.add_argument("--batch", type=int, required=True, help="samples of one process in one step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--held-out", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--started", type=float, default=time.time(), help="when the command was given, in Unix seconds"
    )
    return parser.parse_args()


def optimizer(model, chosen):
    tuned = chosen.way == "tuned"
    if chosen.held_out is None:
        return torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.999), fused=tuned)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=tuned)


def rate(step, chosen):
    """The learning rate of nanoGPT: 100 steps of warm-up, then a cosine to a tenth."""
    if chosen.held_out is None:
        return 1e-3
    if step < 100:
        return 1e-3 * (step + 1) / 101
    passed = (step - 100) / max(1, chosen.steps - 100)
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * passed)) * 9e-4


def main():
    chosen = options()
    torch.set_num_threads(1)
    torch.manual_seed(chosen.seed)
    model = Transformer(chosen.context)
    tuned = chosen.way == "tuned"
    adam = optimizer(model, chosen)
    network = wrap(model, chosen)
    torch.manual_seed(1000 * chosen.seed + share()[0])
    tokens = text(chosen.data)
    pieces = samples(tokens, chosen.context)

    def step(number):
        for group in adam.param_groups:
            group["lr"] = rate(number, chosen)
        if chosen.held_out is None:
            batch = pieces[torch.randint(len(pieces), (chosen.batch,))]
        else:
            # As nanoGPT draws: from any place.
            starts = torch.randint(len(tokens) - chosen.context, (chosen.batch,))
            batch = torch.stack([tokens[start : start + chosen.context + 1] for start in starts.tolist()])
        adam.zero_grad(set_to_none=not tuned)
        loss = network(batch)
        loss.backward()
        if chosen.held_out is not None:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return 2 * [loss.item()]

    figures = train(chosen, step)
    if chosen.held_out is not None:
        with torch.no_grad():
            held_out = samples(text(chosen.held_out), chosen.context)
            bits = sum(model(part).item() * len(part) for part in held_out.split(64)) / len(held_out) / math.log(2)
        print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters, {bits:.4f} bits per byte")
    else:
        tell(figures)
    leave()


if __name__ == "__main__":
    main()
