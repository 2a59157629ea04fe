"""How long transformers' greedy generation takes on this CPU: JSON on the last line.

    python tests/peers/generate.py --config=JSON [--batch=1 --prompt=32 --new=256 --dtype=float32 --steps=3]

--config is a config.json of transformers, whose model of random weights it is. Every answer has exactly `new` tokens;
`whole` is prefill and decoding together. The rest is as in train_step.py.
"""

import argparse
import json
import time
from importlib import metadata

import torch
from train_step import model_of, products_in


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    for name, default in {"steps": 3, "threads": 2, "batch": 1, "prompt": 32, "new": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    model = model_of(flags.config, flags.attention).eval()
    model.generation_config.pad_token_id = 0
    prompts = torch.randint(1, model.config.vocab_size, (flags.batch, flags.prompt))
    found = []
    for _ in range(flags.steps + 1):
        start, cpu = time.perf_counter(), time.process_time()
        with torch.no_grad(), products_in(flags.dtype):
            rows = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=flags.new,
                max_new_tokens=flags.new,
            )
        found.append({"whole": time.perf_counter() - start, "cpu": time.process_time() - cpu})
        assert rows.shape == (flags.batch, flags.prompt + flags.new)
    versions = {name: metadata.version(name) for name in ("transformers", "torch")}
    print(json.dumps({"seconds": found[1:], "threads": torch.get_num_threads(), "versions": versions}))


if __name__ == "__main__":
    main()
