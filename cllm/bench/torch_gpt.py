"""A GPT of torch as its users write it: fused attention, fused AdamW; and a process that trains one.

    python torch_gpt.py TOKENS.npy VOCAB LR SEED STEPS

imports nothing of CLLM. It trains the char size on windows of the file's first 99 % of int64 tokens, on one
thread, measures the loss on the rest, and prints it.
"""

import math
import sys

import torch
from torch.nn import functional as F

__all__ = ["GPT", "adamw"]

CHAR = (4, 4, 128, 64, 12)  # n_layer, n_head, n_embd, block_size, batch_size
WARMUP_STEPS = 100


class Block(torch.nn.Module):
    def __init__(self, n_head, C):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(C), torch.nn.LayerNorm(C)
        self.c_attn, self.attn_proj = torch.nn.Linear(C, 3 * C), torch.nn.Linear(C, C)
        self.c_fc, self.mlp_proj = torch.nn.Linear(C, 4 * C), torch.nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(torch.nn.Module):
    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size):
        super().__init__()
        C = n_embd
        self.wte, self.wpe = torch.nn.Embedding(vocab_size, C), torch.nn.Embedding(block_size, C)
        self.blocks = torch.nn.ModuleList(Block(n_head, C) for _ in range(n_layer))
        self.ln_f = torch.nn.LayerNorm(C)
        for parameter in self.parameters():  # GPT-2's scale: a step's time must not come from odd values
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def adamw(parameters, lr=1e-3):
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.1, fused=True)


def train(path, vocab_size, lr, seed, n_steps):
    """The loss on the last hundredth of the tokens, after so many steps on the others."""
    import numpy as np

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    *_, T, B = CHAR
    tokens = torch.from_numpy(np.load(path, mmap_mode="c"))
    cut = len(tokens) * 99 // 100
    model = GPT(*CHAR[:-1], vocab_size)
    parameters = list(model.parameters())
    optimizer = adamw(parameters, lr)
    for step in range(n_steps):
        past = max(0, step - WARMUP_STEPS) / max(1, n_steps - WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * past)) / 2
        windows = torch.stack([tokens[at : at + T + 1] for at in torch.randint(cut - T, (B,)).tolist()])
        model(windows[:, :-1], windows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    rest = tokens[cut : cut + (len(tokens) - cut - 1) // T * T + 1]
    with torch.no_grad():
        batches = zip(rest[:-1].view(-1, T).split(B), rest[1:].view(-1, T).split(B))
        total = sum(model(x, y).item() * len(x) for x, y in batches)
    return total / (len(rest) // T)


if __name__ == "__main__":
    words = sys.argv[1:]
    print(train(words[0], int(words[1]), float(words[2]), int(words[3]), int(words[4])))
