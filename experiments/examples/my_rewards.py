"""Rewards of one's own, in every form that data.rewards takes: of a batch, of one answer, awaited, per token.

    python -m lm train --config=experiments/own_reward.py --workdir=runs/own_reward/grpo
    python -m lm train --config=experiments/own_reward.py --workdir=runs/own_reward/short \
        --config.data.rewards=experiments/examples/my_rewards.py:accuracy=1.0,experiments/examples/my_rewards.py:brevity=0.1

examples[i] is the row that answer i belongs to: `messages`, the conversation before the answer, and every other field
of the row. texts[i] is the answer. A function that raises, miscounts or says NaN stops the run with one line that names
the row; mend the file, and the same command continues.
"""

import asyncio


def accuracy(examples, texts):
    """Of a batch: 1 for the row's `answer` and nothing else, 0 for anything else."""
    return [float(text.strip() == example["answer"]) for example, text in zip(examples, texts)]


def mentions_answer(example, text):
    """Of one answer, as the first parameter is `example`: half a point for one that holds the right word."""
    return 0.5 * (example["answer"] in text.split())


async def patient_accuracy(example, text):
    """Awaited, all answers of a batch together: here a pause stands for a request to a server."""
    await asyncio.sleep(0.01)
    return float(text.strip() == example["answer"])


def brevity(example, text, tokens):
    """Per token, as there is a parameter `tokens`: every token after the first costs one, where it stands."""
    return [0.0] * min(1, len(tokens)) + [-1.0] * (len(tokens) - 1)
