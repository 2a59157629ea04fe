"""Rewards that check an answer: 1 for right, 0 for wrong.

Those in VERIFIERS compare it with the field `answer` of the row it belongs to (`answer_field` makes a reward of
such a check); `arithmetic` works the sum out itself, and `skills` reads what kind of answer its row asks for. Each
has a table of what it accepts and rejects in tests/rewards (test_verifiers.py, test_skills.py). The next verifier,
of mathematics or of code in a sandbox, is a file here and a line in VERIFIERS.
"""

from collections.abc import Callable, Mapping

from lm.rewards.verifiers.choice import choice_reward
from lm.rewards.verifiers.json_schema import json_schema_reward
from lm.rewards.verifiers.number import number_reward
from lm.rewards.verifiers.skills import skills_reward
from lm.rewards.verifiers.text import exact_reward, regex_reward

VERIFIERS: Mapping[str, Callable] = {
    "exact": exact_reward,
    "number": number_reward,
    "choice": choice_reward,
    "regex": regex_reward,
    "json_schema": json_schema_reward,
    "skills": skills_reward,
}
