"""Conversations to learn from: between humans, and made from the docstrings of the standard library."""

import ast
import functools
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm.data import sources
from lm.data.arithmetic import expression_value
from lm.data.facts.questions import SKILLS, skill_items
from lm.data.facts.tables import fact_table, table_path

QUESTION_TEMPLATES = (
    "What does {} do?",
    "What is {} for?",
    "What is {}?",
    "Explain {}.",
    "Tell me about {}.",
    "Describe {} in one sentence.",
    "Can you explain {} to me?",
)
ARITHMETIC_TEMPLATES = ("What is {}?", "How much is {}?", "Please compute {}.", "Tell me what {} is.")
_SENTENCE = re.compile(r"[A-Z][\w'-]* .*?[\w)'\"\]](?<!\bie|\beg|\bvs)(?<!\be\.g|\bi\.e)(?<!\betc)\.(?=\s|$)")
_NOT_PROSE = re.compile(r">>>|->|--|[{}<>|]|generated")  # signatures, markup, the notes of code generators
Example = Mapping[str, Any]  # what a reward is given: {"messages": [...], **the other fields of its row}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Conversation(NamedTuple):
    name: str
    messages: list[dict]  # {"role", "content"}
    fields: Mapping[str, Any] = {}  # what else its row holds, for rewards: "answer", "tests", ...
    is_whole: bool = False  # a user's own: neither cut into excerpts nor, as a prompt, into turns

    @property
    def content(self) -> str:
        """Its words: two conversations with the same are never parted by a split. See corpus.split."""
        return sources.normalized_words(message["content"] for message in self.messages)


def chitchat_conversations() -> list[Conversation]:
    """Human conversations: the first speaker is the user, the other the assistant."""
    return [Conversation(name, _alternating_messages(turns)) for name, turns in sources.chitchat_dialogues()]


def docstring_conversations() -> list[Conversation]:
    """A question and an answer for each public definition of the standard library that has a sentence of docstring.

    The answer is that sentence; the phrasing of the question is drawn by a hash of the definition's name. Conversations
    bear the name of the module's document, so both are held out together.
    """
    conversations = []
    for document in sources.stdlib_modules():
        parts = document.name.removeprefix("stdlib/").removesuffix(".py").removesuffix("/__init__").split("/")
        if any(part.startswith("_") or not part.isidentifier() for part in parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # old modules hold invalid escapes
            tree = ast.parse(document.text)
        for name, docstring in _documented_names(tree, ".".join(parts)):
            answer = _first_sentence(docstring)
            if answer:
                question = QUESTION_TEMPLATES[_hash_index(name, len(QUESTION_TEMPLATES))].format(name)
                conversations.append(Conversation(document.name, _alternating_messages([question, answer])))
    return conversations


def arithmetic_conversations() -> list[Conversation]:
    """6,000 made sums, differences and products of digits, each worked out by the calculator of
    lm.rewards.environments.

    The assistant asks for calc(...), the tool replies with the number, the assistant says it. A conversation bears the
    name of its sum, so that a sum is held out in every phrasing.
    """
    conversations = []
    for i in range(6000):
        operator = "+-*"[_hash_index(f"operator {i}", 3)]
        a, b = (_hash_index(f"{side} {i}", 10) for side in "ab")
        question = ARITHMETIC_TEMPLATES[_hash_index(f"question {i}", len(ARITHMETIC_TEMPLATES))].format(
            f"{a} {operator} {b}"
        )
        problem = f"{a} {operator} {b}"
        value = str(expression_value(problem))
        turns = ("user", question), ("assistant", f"calc({problem})"), ("tool", value), ("assistant", value)
        conversations.append(
            Conversation(f"arithmetic/{problem}", [{"role": role, "content": text} for role, text in turns])
        )
    return conversations


def skill_conversations(skill: str, path: str = "") -> list[Conversation]:
    """What lm.data.facts asks, and answers, of one of SKILL_SOURCES; of a user's table where `path` names one.

    Their fields are what an answer is checked by (see lm.data.facts.questions), and their names put those with
    something unseen on the held-out side of every split of 2 % or more.
    """
    items = skill_items(skill, fact_table(path), lambda: list(sources.chitchat_dialogues()))
    return [Conversation(*item, is_whole=True) for item in items]


SKILL_SOURCES = (*SKILLS, "practice", "dialogues", "assistant")
CONVERSATION_SOURCES = {
    "chitchat": chitchat_conversations,
    "docstrings": docstring_conversations,
    "arithmetic": arithmetic_conversations,
    **{skill: functools.partial(skill_conversations, skill) for skill in SKILL_SOURCES},
}
CONVERSATION_KINDS: Mapping[str, str] = {
    "chitchat": "forum",
    "docstrings": "documentation",
    "arithmetic": "education",
    **{skill: "forum" if skill == "small_talk" else "education" for skill in SKILL_SOURCES},
}


def built_in_conversations(source: str) -> Callable[[], list[Conversation]] | None:
    """What reads a source of that name, one of CONVERSATION_SOURCES or of SKILL_SOURCES with a user's table
    ("facts:PATH.csv"); None for any other."""
    path = table_path(source, SKILL_SOURCES)
    if path is not None:
        return functools.partial(skill_conversations, source.partition(":")[0], path)
    return CONVERSATION_SOURCES[source] if source in CONVERSATION_SOURCES else None


def conversation_excerpts(conversations: Sequence[Conversation], *, turns: int = 6) -> list[Conversation]:
    """Each conversation cut into stretches of `turns` messages (even, so that each opens with the user), a lone last
    one left out: most human conversations are longer than a row. One that is whole stays so."""
    return [
        conversation
        if conversation.is_whole
        else Conversation(conversation.name, conversation.messages[i : i + turns], conversation.fields)
        for conversation in conversations
        for i in range(0, 1 if conversation.is_whole else len(conversation.messages) - 1, turns)
    ]


def prompt_contexts(
    conversations: Sequence[Conversation], *, turns: int = 3, per_conversation: int = 1
) -> list[Conversation]:
    """Contexts that end in a user's turn of three words or more and await a reply.

    Each holds the last `turns` messages at most and starts with a user's. Of each conversation `per_conversation` are
    drawn by a hash of its name and the turn (0: all are taken); no context comes twice.
    """
    return distinct_conversations(
        repeated_prompt_contexts(conversations, turns=turns, per_conversation=per_conversation)
    )


def distinct_conversations(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations, each text once: the first that has it."""
    by_texts: dict[tuple[str, ...], Conversation] = {}
    for conversation in conversations:
        by_texts.setdefault(tuple(m["content"] for m in conversation.messages), conversation)
    return list(by_texts.values())


def repeated_prompt_contexts(
    conversations: Sequence[Conversation], *, turns: int = 3, per_conversation: int = 1
) -> list[Conversation]:
    """Those of `prompt_contexts`, with repetitions."""
    contexts = []
    for name, messages, fields, is_whole in conversations:
        if is_whole:
            last = max(i for i, message in enumerate(messages) if message["role"] == "user")
            contexts.append(Conversation(name, messages[: last + 1], fields, is_whole))
            continue
        candidates = []
        for i, message in enumerate(messages):
            if message["role"] == "user" and len(message["content"].split()) >= 3:
                context = messages[max(0, i + 1 - turns) : i + 1]
                first = next(j for j, m in enumerate(context) if m["role"] == "user")
                candidates.append(context[first:])
        candidates.sort(key=lambda context: _hash_index(name + context[-1]["content"], 2**32))
        contexts += [Conversation(name, context, fields) for context in candidates[: per_conversation or None]]
    return contexts


def reward_example(messages: Sequence[dict], fields: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The example of a row whose messages, the answer left out, are these: {"messages": messages, **fields}."""
    return {**fields, "messages": messages}


def last_user_message(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user said last; empty if they said nothing."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def conversation_with_answer(prompt: Sequence[dict], text: str) -> list[dict]:
    """The conversation with `text` as the assistant's next message."""
    return [*prompt, {"role": "assistant", "content": text}]


def _alternating_messages(turns: Sequence[str]) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _documented_names(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, docstring
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, Definition) and not child.name.startswith("_"):
                yield from _documented_names(child, f"{name}.{child.name}")


def _first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring, if it is one: a capital, words, at most 200 characters, a period."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = _SENTENCE.match(paragraph)
    if not sentence or len(sentence[0]) > 200 or len(sentence[0].split()) < 3 or _NOT_PROSE.search(sentence[0]):
        return None
    return sentence[0]


def _hash_index(text: str, count: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % count
