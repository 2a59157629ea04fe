"""Environments: they reply to answers of a policy, as a tool does.

(contexts, answers) -> replies: contexts[i] are the messages so far, answers[i] the policy's last one; a reply of None
ends that conversation, and the answer stands as its last.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from lm.data.arithmetic import expression_value

Environment = Callable[[Sequence[Sequence[Mapping[str, str]]], Sequence[str]], list[str | None]]

CALCULATOR_CALL = re.compile(r"calc\(([^()]*)\)")  # how a policy asks the calculator


def calculator(contexts: Sequence[Sequence[Mapping[str, str]]], answers: Sequence[str]) -> list[str | None]:
    """The value of the first calc(...) in each answer, "error" where it is no sum, difference or product of integers;
    None for an answer without a call."""
    asked = [CALCULATOR_CALL.search(answer) for answer in answers]
    return [expression_value(found[1]) if found else None for found in asked]


ENVIRONMENTS: Mapping[str, Environment] = {"calculator": calculator}
