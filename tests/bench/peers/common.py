"""What the peers share: threads, the model, its prompts, and the way a number is reported."""

import os
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
DEVICE = os.environ.get("PEER_DEVICE", "cpu")
# Of the weights that sample, and of the products in training, whose weights stay in f32 on a CPU.
BF16 = os.environ.get("PEER_DTYPE", "f32" if DEVICE == "cpu" else "bf16") == "bf16"


def load(directory, bf16=BF16):
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16 if bf16 else torch.float32)
    return model.to(DEVICE), tokenizer


def seconds(function, times, warm_up, tell=lambda median: None):
    """Median wall time of `function`, called `times` times after `warm_up` calls that do not count; `tell` hears of it after each."""
    taken = []
    for i in range(warm_up + times):
        began = time.perf_counter()
        function(i)
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        if i >= warm_up:
            taken.append(time.perf_counter() - began)
            tell(statistics.median(taken))
    return statistics.median(taken)
