"""How long one step of pretraining takes in PyTorch on this CPU: JSON on the last line.

    python tests/peers/train_step.py --config=JSON [--rows=16 --length=256 --dtype=float32 --steps=5 --threads=2]

--config is a config.json of transformers, whose model of random weights it is, with eager attention; AdamW in its fused
form, the gradient clipped to norm 1, cross entropy of the next token; in bfloat16 autocast around float32 parameters,
as ours has them. Nothing is downloaded. The first step warms up and does not count; `seconds` holds a row for each of
the others. `cpu` is what the process used, all threads together.
"""

import argparse
import contextlib
import json
import os
import time
from importlib import metadata

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def model_of(text: str, attention: str) -> torch.nn.Module:
    """The model of a config.json, with random weights in float32."""
    options = json.loads(text)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)


def products_in(dtype: str):
    """The context in which matrix products are computed in that dtype."""
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast("cpu", dtype=getattr(torch, dtype))


def step_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, dtype: str) -> float:
    """One optimizer step on rows of length + 1 tokens; the loss."""
    with products_in(dtype):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    for name, default in {"steps": 5, "threads": 2, "rows": 16, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    model = model_of(flags.config, flags.attention).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    ids = torch.randint(model.config.vocab_size, (flags.rows, flags.length + 1))
    found, losses = [], []
    for _ in range(flags.steps + 1):
        start, cpu = time.perf_counter(), time.process_time()
        losses.append(step_of(model, optimizer, ids, flags.dtype))
        found.append({"step": time.perf_counter() - start, "cpu": time.process_time() - cpu})
    versions = {name: metadata.version(name) for name in ("transformers", "torch")}
    print(
        json.dumps({"seconds": found[1:], "losses": losses, "threads": torch.get_num_threads(), "versions": versions})
    )


if __name__ == "__main__":
    main()
