"""Seconds a GRPO step takes in plain PyTorch: forward, clipped loss, backward, norm clipping, AdamW, on the records grpo-step gets.

Import, loading and making the batches are not counted. Prompts are padded left and completions right, as TRL does, and the head
is applied to the completions only.
"""

import argparse
import json

import torch
from common import BF16, DEVICE, load, seconds

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("records")
parser.add_argument("--sequences-per-step", type=int, required=True)
parser.add_argument("--times", type=int, default=5)
parser.add_argument("--warm-up", type=int, default=2)
args = parser.parse_args()


def padded(rows, left):
    longest = max(len(row) for row in rows)
    pads = [[0] * (longest - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, pads)]
    mask = [[0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad) for row, pad in zip(rows, pads)]
    return torch.tensor(ids), torch.tensor(mask)


def batch_of(records):
    prompts, prompt_mask = padded([record["prompt_token_ids"] for record in records], left=True)
    completions, mask = padded([record["completion_token_ids"] for record in records], left=False)
    old, _ = padded([record["logprobs"] for record in records], left=False)
    rewards = torch.tensor([float(record["reward"]) for record in records]).view(-1, records[0]["group_size"])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    ids, attention = torch.cat([prompts, completions], 1), torch.cat([prompt_mask, mask], 1)
    return ids, attention, completions, mask, old, advantages.view(-1, 1)


with open(args.records) as lines:
    records = [json.loads(line) for line in lines]
size = args.sequences_per_step
steps = [batch_of(records[i : i + size]) for i in range(0, len(records), size)]
AUTOCAST = BF16 and DEVICE == "cpu"
model, _ = load(args.model, BF16 and not AUTOCAST)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)


def train(i):
    ids, attention, completions, mask, old, advantages = (part.to(DEVICE) for part in steps[i % len(steps)])
    kept = completions.shape[1] + 1
    with torch.autocast(DEVICE, torch.bfloat16, enabled=AUTOCAST):
        logits = model(ids, attention_mask=attention, logits_to_keep=kept, use_cache=False).logits[:, :-1].float()
    logprobs = logits.gather(2, completions.unsqueeze(2)).squeeze(2) - logits.logsumexp(2)
    ratio = (logprobs - old).exp()
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = ((losses * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


print(seconds(train, args.times, args.warm_up))
