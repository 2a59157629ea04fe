"""A user's own prompts, from a file."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm.core.errors import UserError
from lm.core.textfiles import numbered_lines
from lm.data.conversations import Conversation
from lm.tokenizer import ROLES, valid_unicode

LINE_PARSERS: Mapping[str, Callable[[str], Any]] = {".txt": lambda line: {"prompt": line}, ".jsonl": json.loads}


def read_prompts(path: str, warn: Callable[[str], None]) -> list[Conversation]:
    """The prompts of a .txt file, one a line, or of a .jsonl file: {"prompt": text or messages}, and maybe a "name".

    "messages" may replace "prompt". `warn` gets the number of invalid lines; UserError if no line is valid.
    """
    if Path(path).suffix not in LINE_PARSERS:
        raise UserError(f"{path}: give prompts as a .txt file, one a line, or as a .jsonl file")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"no prompts at {path} ({error.strerror}): give a .txt or .jsonl file") from error
    prompts: dict[str, Conversation] = {}
    faults = []
    for number, line in numbered_lines(data):
        try:
            name, messages = parsed_prompt(LINE_PARSERS[Path(path).suffix](line.decode().strip()))
            key = json.dumps(messages)
            if key in prompts:
                raise ValueError("a prompt that came before")
            # The name decides what is held out: without one of its own, a prompt is its own source.
            prompts[key] = Conversation(name or f"prompt/{hashlib.sha256(key.encode()).hexdigest()[:16]}", messages)
        except (ValueError, RecursionError) as error:
            faults.append(f"{path}:{number}: {error}")
    if not prompts:
        raise UserError(f"no prompt in {path}" + (f", as {faults[0]}" if faults else ": it is empty"))
    if faults:
        lines = len(faults) + len(prompts)
        warn(f"{len(faults)} of {lines} lines are not valid and are left out; the first: {faults[0]}")
    return list(prompts.values())


def parsed_prompt(record: Any) -> tuple[str, list[dict]]:
    """(name or "", messages) of a line. ValueError says what is wrong with it."""
    if not isinstance(record, dict) or not {"prompt", "messages"} & set(record):
        raise ValueError("not an object with a prompt or messages")
    messages = record["prompt"] if "prompt" in record else record["messages"]
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError("the prompt is neither a text nor a list of messages {'role', 'content'}")
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError("the prompt does not end with something that a user says")
    name = record["name"] if "name" in record else ""
    if not isinstance(name, str):
        raise ValueError(f"name is {name!r}, not text")
    return valid_unicode(name), [
        {"role": message["role"], "content": valid_unicode(message["content"])} for message in messages
    ]


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and {"role", "content"} <= set(message)
        and message["role"] in ROLES
        and isinstance(message["content"], str)
    )
