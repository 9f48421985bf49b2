"""llama.cpp sampling from a GGUF file, one sequence after the other: tokens/s from loading on."""

import argparse
import json
import os
import time

from llama_cpp import Llama


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("prompts")
    parser.add_argument("--prompts", dest="count", type=int)
    parser.add_argument("--new-tokens", type=int)
    options = parser.parse_args()
    began, tokens = time.perf_counter(), 0
    threads = int(os.environ["OMP_NUM_THREADS"])
    llama = Llama(options.file, n_ctx=1024, n_threads=threads, n_threads_batch=threads, seed=1, verbose=False)
    with open(options.prompts, encoding="utf-8") as lines:
        texts = ["\n".join(message["content"] for message in json.loads(line)["prompt"]) for line in lines][: options.count]
    prompts = [llama.tokenize(text.encode()) for text in texts]
    for prompt in prompts:
        llama.reset()
        for made, _ in enumerate(llama.generate(prompt, top_k=0, top_p=1.0, min_p=0.0, temp=1.0, repeat_penalty=1.0), start=1):
            if made == options.new_tokens:
                break
        tokens += made
    print(tokens / (time.perf_counter() - began))


main()
