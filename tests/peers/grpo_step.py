"""How long one GRPO step of TRL takes on this CPU, phase by phase: JSON on the last line.

    python tests/peers/grpo_step.py [--steps=5] [--threads=2] [--layers=4 --width=256 ...]      (with tests/peers.txt)

TRL's own GRPOTrainer with a GPT-2 of random weights, float32, AdamW: sample an answer of exactly `new` tokens for each
of prompts x group rows, score them, find the reference's log-probs, take one optimizer step. Nothing is downloaded: the
tokenizer is a list of made words, the reward is the share of even token ids. The first step warms up and does not
count; `seconds` holds a row for each of the others. `cpu` is what the process used, all threads together: far
below threads x `step` means that others used the machine.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections import defaultdict
from importlib import metadata

os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer


class Clock:
    """Seconds spent in named phases, a row for each step."""

    def __init__(self):
        self.steps, self.now = [], defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        yield
        self.now[name] += time.perf_counter() - start

    def timed(self, name: str, function):
        def run(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return run


class Steps(TrainerCallback):
    """Closes the clock's row at the end of each step."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_begin(self, args, state, control, **kwargs):
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        whole = {"step": time.perf_counter() - self.start, "cpu": time.process_time() - self.cpu}
        self.clock.steps.append({**whole, **self.clock.now})
        self.clock.now.clear()


def made_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word: <end>, then w1, w2, ..."""
    words = ["<end>", *(f"w{i}" for i in range(1, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<end>", padding_side="left"
    )


def even(completion_ids, **kwargs) -> list[float]:
    """The share of even token ids of each answer."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def trainer(size: argparse.Namespace, folder: str, clock: Clock) -> GRPOTrainer:
    """TRL's trainer at that size, with a clock around its phases."""
    config = GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=size.prompt + size.new,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        n_inner=size.hidden,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    start = f"{folder}/start"  # on disk, for TRL reads the reference from where the policy came
    GPT2LMHeadModel(config).save_pretrained(start)
    options = GRPOConfig(
        output_dir=folder,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size.prompts * size.group,
        num_generations=size.group,
        max_completion_length=size.new,
        generation_kwargs={"min_new_tokens": size.new},  # nobody ends early: every step is the same work
        beta=0.04,  # so that there is a reference, as in our stage grpo
        loss_type="grpo",
        learning_rate=1e-4,
        max_steps=size.steps + 1,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    words = torch.randint(1, size.vocabulary, (size.prompts * (size.steps + 1), size.prompt)).tolist()
    made = GRPOTrainer(
        start,
        even,
        args=options,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in words]}),
        processing_class=made_tokenizer(size.vocabulary),
        callbacks=[Steps(clock)],
    )
    made._generate = clock.timed("generation", made._generate)
    made._generate_and_score_completions = clock.timed("rollout", made._generate_and_score_completions)
    made.compute_loss = clock.timed("loss", made.compute_loss)
    made.accelerator.backward = clock.timed("backward", made.accelerator.backward)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"steps": 5, "threads": 2, "prompts": 4, "group": 8, "prompt": 64, "new": 64}
    defaults |= {"layers": 4, "width": 256, "heads": 4, "hidden": 1024, "vocabulary": 4096}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    size = parser.parse_args()
    torch.set_num_threads(size.threads)
    set_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer(size, folder, clock).train()
    counted = [with_rest(step) for step in clock.steps[1:]]
    versions = {name: metadata.version(name) for name in ("trl", "transformers", "torch")}
    print(
        json.dumps({"seconds": counted, "threads": torch.get_num_threads(), "size": vars(size), "versions": versions})
    )


def with_rest(step: dict[str, float]) -> dict[str, float]:
    """`scoring` is a rollout's time outside generation (rewards, the reference's log-probs), `other` what is left."""
    rollout = step.pop("rollout")
    named = rollout + step["loss"] + step["backward"]
    return {**step, "scoring": rollout - step["generation"], "other": step["step"] - named}


if __name__ == "__main__":
    main()
