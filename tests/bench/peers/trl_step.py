"""Seconds a whole step of TRL's GRPOTrainer takes, and the mean length of its completions: sample, score with the notebook's five
rewards, train. A line after each step, of all that count so far.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import DEVICE, load
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
import make_score_reference as seed

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("records")
parser.add_argument("--prompts-per-step", type=int, required=True)
parser.add_argument("--generations", type=int, required=True)
parser.add_argument("--new-tokens", type=int, required=True)
parser.add_argument("--learning-rate", type=float, required=True)
parser.add_argument("--times", type=int, default=8)
parser.add_argument("--warm-up", type=int, default=2)
args = parser.parse_args()


def reward(name):
    def function(completions, answer, **_):
        return [seed.rewards(text[0]["content"], right)[0][name] for text, right in zip(completions, answer)]

    function.__name__ = name
    return function


class Clock(TrainerCallback):
    ends, lengths = [], []

    def on_train_begin(self, *_, **__):
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())

    # After each step; a last one tells of the whole training, without lengths.
    def on_log(self, *_, logs, **__):
        if "completions/mean_length" not in logs:
            return
        self.lengths.append(logs["completions/mean_length"])
        ends = self.ends[args.warm_up :]
        if len(ends) > 1:
            taken = [after - before for before, after in zip(ends, ends[1:])]
            print(statistics.median(taken), statistics.mean(self.lengths[args.warm_up :]), flush=True)


disable_progress_bars()
model, tokenizer = load(args.model)
with tempfile.TemporaryDirectory() as directory:
    config = GRPOConfig(
        output_dir=directory,
        use_cpu=DEVICE == "cpu",
        bf16=DEVICE != "cpu",
        gradient_checkpointing=False,
        per_device_train_batch_size=args.prompts_per_step * args.generations,
        num_generations=args.generations,
        max_completion_length=args.new_tokens,
        max_steps=args.warm_up + args.times,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
        loss_type="grpo",
        beta=0.0,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[reward(name) for name in seed.NAMES],
        args=config,
        train_dataset=Dataset.from_json(args.records).select_columns(["prompt", "answer"]),
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
