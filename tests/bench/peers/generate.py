"""Tokens/s of transformers' `generate`: --generations samples of each of the first --prompts prompts, in one batch.

Import, loading and tokenizing are not counted. A line after each run, of which the last counts. The model directory names an end token that does not exist, so all lengths are equal.
"""

import argparse
import json

import torch
from common import DEVICE, load, seconds

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("records")
parser.add_argument("--prompts", type=int, required=True)
parser.add_argument("--generations", type=int, required=True)
parser.add_argument("--new-tokens", type=int, required=True)
parser.add_argument("--times", type=int, default=3)
parser.add_argument("--warm-up", type=int, default=1)
args = parser.parse_args()

model, tokenizer = load(args.model)
model.eval()
with open(args.records) as lines:
    prompts = [json.loads(line)["prompt"] for _, line in zip(range(args.prompts), lines)]
texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
batch = tokenizer(texts, return_tensors="pt", padding=True).to(DEVICE)
sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)


@torch.inference_mode()
def generate(_):
    output = model.generate(**batch, **sampling, num_return_sequences=args.generations, max_new_tokens=args.new_tokens)
    new = output.shape[1] - batch["input_ids"].shape[1]
    assert output.shape[0] == args.prompts * args.generations and new == args.new_tokens, output.shape


tokens = args.prompts * args.generations * args.new_tokens
seconds(generate, args.times, args.warm_up, tell=lambda median: print(tokens / median, flush=True))
