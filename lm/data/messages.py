"""Messages as other people's rows hold them, turned into ours and checked.

Ours are {"role", "content"}; an assistant's has "weight" where the row says that it counts more or less than 1, or is
not trained at all (0).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm.tokenizer import ROLES

ROLE_NAMES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant", "function_call": "assistant", "function": "tool", "observation": "tool",
    "function_response": "tool", "ipython": "tool", "developer": "system",
}  # fmt: skip  # theirs, and ours
UNREAD_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking")  # words that are not in the content
TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")  # of a conversation in one string (Anthropic's HH)
LIST_OPENINGS = ("[{", '["')  # of a list that a table holds as JSON in a cell


class RowFault(ValueError):
    """Why a row cannot be used, in words that follow its place."""


def list_value(value: Any) -> Any:
    """A list of messages or texts that a table holds as JSON in a cell; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(LIST_OPENINGS):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def checked_conversation(given: Any, *, ends: str = "") -> list[dict[str, Any]]:
    """Messages {"role", "content"} of a list in one of the field's forms. RowFault for a conversation that is none.

    ends: the role that the last message must have. An assistant's message may say "train": false, or its "weight".
    """
    given = list_value(given)
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, Sequence) or not given:
        raise RowFault("a conversation without messages")
    messages = [_checked_message(message, number) for number, message in enumerate(given, 1)]
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if not spoken or spoken[0] != "user":
        raise RowFault(f"{'the ' + spoken[0] if spoken else 'nobody'} speaks first: a user's message must come first")
    for before, after in zip(messages, messages[1:]):
        if before["role"] == after["role"] != "tool":
            raise RowFault(f"two messages of the {after['role']} in a row: join them")
    if ends and spoken[-1] != ends:
        raise RowFault(f"it ends with the {spoken[-1]}, not with the {ends}")
    return messages


def prompt_messages(given: Any) -> list[dict[str, Any]]:
    """A text or messages that end with the user's; what the assistant says in them is context, not trained."""
    return [
        {**message, "weight": 0.0} if message["role"] == "assistant" else message
        for message in checked_conversation(given, ends="user")
    ]


def bare_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Role and content alone."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def transcript_messages(text: Any) -> list[dict[str, str]]:
    """The messages of a conversation in one string, "\\n\\nHuman: ...\\n\\nAssistant: ..."; none for anything else."""
    before, *parts = TRANSCRIPT_TURN.split(text) if isinstance(text, str) else [""]
    if before.strip():
        return []
    turns = zip(parts[::2], parts[1::2])
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in turns]


def name_of_row(fields: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
    """What decides on which side a row is held out: its own name, else its words."""
    if "name" in fields and isinstance(fields["name"], str):
        return fields["name"]
    words = " ".join(" ".join(message["content"].split()) for message in messages)
    return f"row/{hashlib.sha256(words.encode(errors='surrogatepass')).hexdigest()[:16]}"


def with_system(fields: Mapping[str, Any], messages: Any) -> Any:
    """The messages after those of the row's field `system`, where it has one and they do not open with another."""
    messages = list_value(messages)
    system = fields["system"] if "system" in fields else ""
    if not isinstance(system, str) or not system.strip():
        return messages
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if messages and isinstance(messages[0], Mapping) and _role(messages[0]) == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _role(message: Mapping[str, Any]) -> Any:
    role = message["role"] if "role" in message else message["from"] if "from" in message else None
    role = role.lower() if isinstance(role, str) else role
    return ROLE_NAMES[role] if role in ROLE_NAMES else role


def _checked_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, (dict, Mapping)):  # a dict first: that is quick to see
        raise RowFault(f"message {number} is {message!r:.60}, not an object with role and content")
    role = _role(message)
    content = message["content"] if "content" in message else message["value"] if "value" in message else None
    if not isinstance(role, str) or role not in ROLES:
        raise RowFault(f"message {number} has the unknown role {role!r}: use one of {', '.join(ROLES)}")
    unread = [key for key in UNREAD_KEYS if key in message and message[key]]
    if unread:
        raise RowFault(f"message {number} has {unread[0]!r}, which is not read: write it into its content")
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and "text" in part and isinstance(part["text"], str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowFault(f"message {number} has {content!r:.60} for content, not text")
    if not content.strip():
        raise RowFault(f"message {number} of the {role} is empty: remove it, or the row")
    weight = _message_weight(message, number)
    return {"role": role, "content": content, **({} if weight == 1 or role != "assistant" else {"weight": weight})}


def _message_weight(message: Mapping[str, Any], number: int) -> float:
    train = message["train"] if "train" in message and message["train"] is not None else True
    if not isinstance(train, bool):
        raise RowFault(f"message {number} has {train!r} for train: give true or false")
    weight = message["weight"] if "weight" in message and message["weight"] is not None else 1
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise RowFault(f"message {number} has the weight {weight!r}: give a number from 0 up")
    return float(weight) if train else 0.0
