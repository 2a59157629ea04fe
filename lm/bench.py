"""How long one GRPO step takes on this machine, phase by phase, against its matmul ceiling and against TRL.

    python -m lm.bench
    python -m lm.bench --peer=PYTHON      (an interpreter with tests/peers.txt: TRL's step, interleaved with ours)

Size S: 4 layers, width 256, 4 heads, vocabulary 4,096; 4 prompts of 64 tokens x 8 answers of 64 tokens, none ending
early, float32, AdamW, the reference's log-probs included on both sides. The first step of each turn compiles and does
not count; a figure is the median of the others, in seconds.
"""

import dataclasses
import functools
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm import model as models, optim
from lm.config import parsed
from lm.console import Progress, main, say, table
from lm.errors import UserError, at_least
from lm.hardware import matmul_ceiling
from lm.model.params import matmul_count
from lm.stages import grpo
from lm.stages.answering import rollout
from lm.types import Rollouts

FLAGS = {
    "peer": dict(default="", metavar="PYTHON", help="an interpreter that has TRL: its step is timed too, in turns"),
    "steps": dict(type=int, default=5, help="steps that are timed in each turn"),
    "turns": dict(type=int, default=3, help="how often the two sides take turns"),
}
PEER = Path(__file__).parents[1] / "tests" / "peers" / "grpo_step.py"
# Of SwiGLU's three matrices 683 columns have the parameters of 1,024 in GPT-2's two.
SIZE_S = models.Config(
    vocab_size=4096, layers=4, width=256, heads=4, kv_heads=4, head_size=64, hidden=683, context=128, qk_norm=False
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a step does."""

    prompts: int = 4
    group: int = 8
    prompt: int = 64  # tokens
    new: int = 64


def steps_of(shape: Shape, count: int, *, beta: float = 0.04) -> list[dict[str, float]]:
    """Seconds of `count` steps of stage grpo, after one that compiles: generation, update (reference's and own
    log-probs, loss, gradient, AdamW), and both."""
    model = models.make(SIZE_S.on(jax.default_backend()))
    update = grpo.make(model, optim.make(learning_rate=1e-4, total_steps=1000), beta=beta)
    state = jax.jit(lambda key: update.init(key, {"lm": model.init(key)}, {}))(jax.random.key(0))
    draw = jax.jit(functools.partial(rollout, model, max_new=shape.new, stop=()))
    step = jax.jit(update.update, donate_argnums=0)
    rows = shape.prompts * shape.group
    prompts = np.random.default_rng(0).integers(1, SIZE_S.vocab_size, (shape.prompts, shape.prompt))
    prompts, lengths = prompts.repeat(shape.group, axis=0).astype(np.int32), np.full(rows, shape.prompt, np.int32)
    found = []
    for i in range(count + 1):
        start = time.perf_counter()
        tokens, logprobs, drawn = jax.block_until_ready(
            draw(state.params["lm"], prompts, lengths, jax.random.fold_in(jax.random.key(1), i))
        )
        sampled = time.perf_counter()
        rewards = np.mean(np.asarray(drawn.tokens) % 2 == 0, axis=1, dtype=np.float32)
        batch = Rollouts(tokens, rewards, {}, np.asarray(drawn.stopped), logprobs, group=shape.group)
        state, _ = jax.block_until_ready(step(state, batch))
        end = time.perf_counter()
        found.append({"generation": sampled - start, "update": end - sampled, "step": end - start})
    return found[1:]


def flops(shape: Shape) -> float:
    """Of the matrix products a step cannot do without: one pass to generate, one of the reference, one forward and
    backward, two a parameter and token in each pass; attention is left out."""
    tokens = shape.prompts * shape.group * (shape.prompt + shape.new)
    return 2 * matmul_count(SIZE_S) * tokens * (1 + 1 + 3)


def peer_step(python: str, count: int) -> dict[str, float]:
    """Seconds of each phase, as TRL's script says of its own steps."""
    command = [python, str(PEER), f"--steps={count}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"cannot run {python}: {error.strerror}; give a Python with tests/peers.txt") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["without a word"]
        raise UserError(f"{' '.join(command)} failed: {said[0]}; give a Python with tests/peers.txt")
    return json.loads(done.stdout.strip().splitlines()[-1])["seconds"]


def measured(*, peer: str, steps: int, turns: int) -> dict[str, Any]:
    """Medians of our phases, of the peer's where one is given, and the machine's ceiling; the sides take turns."""
    at_least(1, "bench", steps=steps, turns=turns)
    shape, ours, theirs = Shape(), [], []
    ceiling = 0.0
    with Progress("bench", turns, "turn") as progress:
        for turn in range(turns):
            ceiling = max(ceiling, matmul_ceiling())
            ours += steps_of(shape, steps)
            if peer:
                theirs.append(peer_step(peer, steps))
            progress.update(turn + 1, {"step": ours[-1]["step"]})
    median = lambda rows, name: statistics.median(row[name] for row in rows)
    return {
        "ours": {name: median(ours, name) for name in ours[0]},
        "best": {name: min(row[name] for row in ours) for name in ours[0]},
        "peer": {name: median(theirs, name) for name in theirs[0] if isinstance(theirs[0][name], float)}
        if peer
        else {},
        "ceiling": ceiling,
        "floor": flops(shape) / ceiling,
    }


def show(found: dict[str, Any]) -> None:
    """The phases as a table, and the ratios in words."""
    ours, best, peer = found["ours"], found["best"], found["peer"]
    names = [*ours, *(name for name in peer if name not in ours)]
    cell = lambda side, name: f"{side[name]:.3f}" if name in side else ""
    table(
        "One GRPO step, seconds",
        ["", "ours", "best", "TRL"],
        [[n, *(cell(s, n) for s in (ours, best, peer))] for n in names],
    )
    say(
        f"matmul ceiling {found['ceiling'] / 1e9:.0f} GFLOP/s: the products alone take {found['floor']:.2f} s, "
        f"{found['floor'] / ours['step']:.2f} of our step"
    )
    if peer:
        say(f"TRL takes {peer['step'] / ours['step']:.2f} times as long")


def program(argv: list[str]) -> None:
    flags = parsed(argv, __doc__, FLAGS)
    show(measured(peer=flags.peer, steps=flags.steps, turns=flags.turns))


if __name__ == "__main__":
    main(program, long=True)
