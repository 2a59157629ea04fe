"""Environments: they reply to answers of a policy, as a tool does.

(examples, answers) -> replies: examples[i] is the row with its messages so far, answers[i] the policy's last one; a
reply of None ends that conversation, and the answer stands as its last.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from lm.data.arithmetic import expression_value
from lm.data.conversations import Example

Environment = Callable[[Sequence[Example], Sequence[str]], list[str | None]]

CALCULATOR_CALL = re.compile(r"calc\(([^()]*)\)")  # how a policy asks the calculator


def calculator(examples: Sequence[Example], answers: Sequence[str]) -> list[str | None]:
    """The value of the first calc(...) in each answer, "error" where it is no sum, difference or product of integers;
    None for an answer without a call."""
    asked = [CALCULATOR_CALL.search(answer) for answer in answers]
    return [expression_value(found[1]) if found else None for found in asked]


ENVIRONMENTS: Mapping[str, Environment] = {"calculator": calculator}
