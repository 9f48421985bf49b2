"""Tokens/s of transformers' continuous batching, `generate_batch`, on a GPU: --generations samples of each of the first --prompts
prompts.

Import, loading and tokenizing are not counted; caches and graphs are made once, in the warm-up. A line after each run, of which the
last counts. The model directory names an end token that does not exist, so all lengths are equal.
"""

import argparse
import json

from common import load, seconds
from transformers import GenerationConfig

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
inputs = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True) for prompt in prompts]
inputs = [list(ids["input_ids"] if hasattr(ids, "keys") else ids) for ids in inputs for _ in range(args.generations)]
config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.new_tokens, eos_token_id=-1)


def generate(_):
    outputs = model.generate_batch(inputs=inputs, generation_config=config, persistent_manager=True)
    new = [len(output.generated_tokens) for output in outputs.values()]
    assert len(new) == len(inputs) and min(new) == args.new_tokens, new


tokens = len(inputs) * args.new_tokens
seconds(generate, args.times, args.warm_up, tell=lambda median: print(tokens / median, flush=True))
model.destroy_cached_continuous_batching_manager()
