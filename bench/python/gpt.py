"""A transformer of 0.8 million parameters over the pixels of small digits, for comparisons with other trainers.

Causal, pre-norm (Vaswani et al., 2017; Radford et al., 2019). A picture of 8 x 8 pixels with 256 levels is a text of 64 tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn

LEVELS, CONTEXT = 256, 64
LAYERS, HEADS, WIDTH, DROPOUT = 4, 4, 128, 0.1
LEARNING_RATE = 3e-4


class Block(nn.Module):
    """Attention, then a perceptron, each added to the input: (n, tokens, width) to the same."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(DROPOUT)
        self.register_buffer("future", torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1), persistent=False)

    def attention(self, x):
        """(n, tokens, width) to the same; a token sees itself and those before it."""
        split = self.qkv(x).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        scores = query @ key.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
        weights = self.dropout(scores.masked_fill(self.future, float("-inf")).softmax(-1))
        return self.out((weights @ value).transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norms[0](x)))
        return x + self.dropout(self.mlp(self.norms[1](x)))


class Transformer(nn.Module):
    """Images (n, 1, 8, 8) in [-1, 1] to the mean of their tokens' negative log-likelihoods."""

    def __init__(self):
        super().__init__()
        # One token more: that in front of the first.
        self.tokens, self.places = nn.Embedding(LEVELS + 1, WIDTH), nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LEVELS, bias=False)
        self.dropout = nn.Dropout(DROPOUT)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images):
        tokens = ((images.flatten(1) + 1.0) * 127.5).round().long().clamp(0, LEVELS - 1)
        before = F.pad(tokens[:, :-1], (1, 0), value=LEVELS)
        logits = self.head(self.norm(self.blocks(self.dropout(self.tokens(before) + self.places))))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
