"""What a row is, by its fields: a text, a conversation, a preference or a prompt, in the formats that the field uses.

| format | fields |
|---|---|
| ranking | responses, ranking (see `lm.data.preferences`) |
| preference | chosen, rejected; prompt, or messages that both begin with; margin, or score_chosen, score_rejected |
| label | prompt, completion, label: whether the completion is good (KTO) |
| ratings | prompt or instruction, completions: {response, score} each (UltraFeedback) |
| conversation | messages (role, content); conversations (from, value: ShareGPT); prompt, completion;
  instruction, input, output (Alpaca) |
| prompt | prompt, or messages that end with the user's; every other field goes to the reward |
| text | text |

A prompt, completion, chosen or rejected is a string or a list of messages. Other names for a field: `columns`.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm.core.errors import UserError
from lm.data.conversations import Conversation
from lm.data.files import SourceRow, source_rows
from lm.data.preferences import DESIRABLE, LABEL_AXIS, UNDESIRABLE, Ranking, ranking_from_record
from lm.tokenizer import ROLES

ROLE_NAMES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant", "function": "tool", "observation": "tool",
}  # fmt: skip  # theirs, and ours
UNKNOWN_TIME = "1970-01-01T00:00:00+00:00"  # of a verdict that does not say when it was given
SCORE_FIELDS = ("score", "rating", "overall_score")  # of a completion among several
PROMPT_FIELDS = ("messages", "prompt", "conversations", "instruction", "input", "system")  # no fields of a reward


class RecognizedRow(NamedTuple):
    """A row and what it is."""

    format: str
    value: str | Conversation | Ranking


class RowFault(ValueError):
    """Why a row cannot be used, in words that follow its place."""


class BadRows:
    """Tolerates `limit` bad rows of one source, then raises: the count, and the faults for a report."""

    def __init__(self, limit: int):
        self.limit, self.faults = limit, []

    def add(self, place: str, fault: object) -> None:
        self.faults.append(f"{place}: {fault}")
        if len(self.faults) > self.limit:
            more = f" (data.skip_bad_rows is {self.limit})" if self.limit else ""
            raise UserError(f"{self.faults[-1]}; or set data.skip_bad_rows to pass over bad rows{more}")


def recognized_rows(
    source: str, wanted: Sequence[str], *, columns: Mapping[str, str], bad_rows: BadRows
) -> Iterator[RecognizedRow]:
    """The rows of a source that are of a `wanted` format; any other row is a bad one, as is one with a fault.

    columns: our field -> theirs.
    """
    for row in source_rows(source):
        try:
            found = recognized_row(row, columns)
            if found.format not in wanted:
                raise RowFault(f"it is a {found.format}, and {' or '.join(wanted)} is needed here")
        except RowFault as fault:
            bad_rows.add(row.place, fault)
            continue
        yield found


def recognized_row(row: SourceRow, columns: Mapping[str, str] = {}) -> RecognizedRow:  # noqa: B006
    """What a row is. RowFault says what is wrong with it."""
    if row.fault:
        raise RowFault(row.fault)
    fields = renamed_fields(row.fields, columns)
    for name, (needed, convert) in FORMATS.items():
        if needed <= fields.keys():
            try:
                value = convert(fields)
            except RowFault:
                raise
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise RowFault(f"no {name} ({error}): mend or remove it") from error
            if isinstance(value, Conversation) and value.messages[-1]["role"] != "assistant":
                return RecognizedRow("prompt", value)
            return RecognizedRow(name, value)
    has = ", ".join(sorted(map(str, fields))) or "none"
    raise RowFault(
        f"its fields ({has}) are of no known format: name yours in data.columns, as in {{'prompt': 'question'}}"
    )


def renamed_fields(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The fields by our names; None, as tables hold it for what is absent, is no field."""
    for ours, theirs in columns.items():
        if theirs not in fields:
            raise RowFault(f"it has no field {theirs!r}, which data.columns names for {ours!r}")
    taken = set(columns.values())
    kept = {name: value for name, value in fields.items() if name not in taken}
    return {
        name: value
        for name, value in {**kept, **{ours: fields[theirs] for ours, theirs in columns.items()}}.items()
        if value is not None
    }


def checked_conversation(given: Any, *, ends: str = "") -> list[dict[str, Any]]:
    """Messages {"role", "content"} of a list in one of the field's forms. RowFault for a conversation that is none.

    ends: the role that the last message must have. An assistant's message may say "train": false, or its "weight".
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, Sequence) or not given:
        raise RowFault("a conversation without messages")
    found = [_checked_message(message, number) for number, message in enumerate(given, 1)]
    spoken = [message["role"] for message in found if message["role"] != "system"]
    if not spoken or spoken[0] != "user":
        raise RowFault(f"{'the ' + spoken[0] if spoken else 'nobody'} speaks first: a user's message must come first")
    for before, after in zip(spoken, spoken[1:]):
        if before == after != "tool":
            raise RowFault(f"two messages of the {after} in a row: join them")
    if ends and spoken[-1] != ends:
        raise RowFault(f"it ends with the {spoken[-1]}, not with the {ends}")
    return found


def _checked_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowFault(f"message {number} is {message!r:.60}, not an object with role and content")
    role = message["role"] if "role" in message else message["from"] if "from" in message else None
    content = message["content"] if "content" in message else message["value"] if "value" in message else None
    role = ROLE_NAMES[role] if role in ROLE_NAMES else role
    if role not in ROLES:
        raise RowFault(f"message {number} has the unknown role {role!r}: use one of {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowFault(f"message {number} has {content!r:.60} for content, not text")
    if not content.strip():
        raise RowFault(f"message {number} of the {role} is empty: remove it, or the row")
    weight = _message_weight(message, number)
    return {"role": role, "content": content, **({} if weight == 1 else {"weight": weight})}


def _message_weight(message: Mapping[str, Any], number: int) -> float:
    weight = message["weight"] if message.get("weight") is not None else 1
    if message.get("train") is False:
        weight = 0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise RowFault(f"message {number} has the weight {weight!r}: give a number from 0 up")
    return float(weight)


def _named(fields: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
    """What decides on which side a row is held out: its own name, else its words."""
    if isinstance(fields.get("name"), str):
        return fields["name"]
    words = " ".join(word for message in messages for word in message["content"].split())
    return f"row/{hashlib.sha256(words.encode(errors='surrogatepass')).hexdigest()[:16]}"


def _conversation(fields: Mapping[str, Any], messages: list[dict], used: Sequence[str] = ()) -> Conversation:
    kept = {name: value for name, value in fields.items() if name not in (*PROMPT_FIELDS, *used)}
    return Conversation(_named(fields, messages), messages, kept, is_whole=True)


def _from_messages(fields: Mapping[str, Any]) -> Conversation:
    return _conversation(fields, checked_conversation(fields["messages"]))


def _from_sharegpt(fields: Mapping[str, Any]) -> Conversation:
    messages = fields["conversations"]
    if isinstance(fields.get("system"), str) and fields["system"].strip():
        messages = [{"role": "system", "content": fields["system"]}, *messages]
    return _conversation(fields, checked_conversation(messages))


def _from_alpaca(fields: Mapping[str, Any]) -> Conversation:
    more = fields["input"] if isinstance(fields.get("input"), str) and fields["input"].strip() else ""
    question = f"{fields['instruction']}\n\n{more}" if more else fields["instruction"]
    answer = {"role": "assistant", "content": fields["output"]}
    return _conversation(fields, checked_conversation([{"role": "user", "content": question}, answer]), ("output",))


def _from_prompt_completion(fields: Mapping[str, Any]) -> Conversation:
    messages = [*_prompt(fields["prompt"]), *_completion(fields["completion"])]
    return _conversation(fields, checked_conversation(messages), ("completion",))


def _from_prompt(fields: Mapping[str, Any]) -> Conversation:
    answer = fields["reward_model"].get("ground_truth") if isinstance(fields.get("reward_model"), Mapping) else None
    answer = fields.get("answer", fields.get("ground_truth", answer))  # verl's and open-instruct's names
    given = {**fields, **({} if answer is None else {"answer": answer})}
    return _conversation(given, _prompt(fields["prompt"]))


def _prompt(given: Any) -> list[dict]:
    return checked_conversation(given, ends="user")


def _completion(given: Any) -> list[dict]:
    return [{"role": "assistant", "content": given}] if isinstance(given, str) else list(given)


def _answer_text(given: Any, prompt: Sequence[Mapping[str, Any]]) -> str:
    """The one answer in a completion, or in a conversation that begins with the prompt."""
    if isinstance(given, str):
        return given
    messages = [{key: m[key] for key in ("role", "content")} for m in given]
    asked = [{key: m[key] for key in ("role", "content")} for m in prompt]
    messages = messages[len(asked) :] if messages[: len(asked)] == asked else messages
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowFault("chosen and rejected must each end in one answer to the same prompt")
    return messages[0]["content"]


def _shared_prompt(chosen: Any, rejected: Any) -> list[dict]:
    """The messages that both begin with, where no prompt is given."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowFault("chosen and rejected are texts without a prompt: add the field prompt")
    shared = []
    for a, b in zip(chosen, rejected):
        if a != b:
            break
        shared.append(a)
    return _prompt(shared)


def _ranking(fields, prompt: list[dict], responses: list[str], ranks: list[int], axes=None) -> Ranking:
    if any(not text.strip() for text in responses):
        raise RowFault("an answer is empty: remove it, or the row")
    name = _named(fields, prompt)
    return Ranking(name, prompt, responses, ranks, str(fields.get("rater", "file")), UNKNOWN_TIME, axes=axes or {})


def _from_pair(fields: Mapping[str, Any]) -> Ranking:
    """margin (or the difference of the scores), rounded and at least 1, is the distance of the ranks."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    prompt = _prompt(fields["prompt"]) if "prompt" in fields else _shared_prompt(chosen, rejected)
    texts = [_answer_text(side, prompt) for side in (chosen, rejected)]
    if texts[0] == texts[1]:
        raise RowFault("chosen equals rejected: nobody can learn from it")
    margin = fields.get("margin", 1)
    if "score_chosen" in fields and "score_rejected" in fields:
        margin = fields["score_chosen"] - fields["score_rejected"]
    if not margin > 0:
        raise RowFault(f"chosen is not better than rejected: their margin is {margin:g}")
    return _ranking(fields, prompt, texts, [1, 1 + max(1, round(margin))])


def _from_label(fields: Mapping[str, Any]) -> Ranking:
    label = fields["label"]
    label = {"true": True, "1": True, "false": False, "0": False}.get(str(label).lower(), label)
    if not isinstance(label, bool):
        raise RowFault(f"label is {label!r}, neither true nor false")
    prompt = _prompt(fields["prompt"])
    text = _answer_text(_completion(fields["completion"]), prompt)
    axes = {LABEL_AXIS: [DESIRABLE if label else UNDESIRABLE]}
    return _ranking(fields, prompt, [text], [1], axes)


def _from_ratings(fields: Mapping[str, Any]) -> Ranking:
    prompt = _prompt(fields["prompt"] if "prompt" in fields else fields["instruction"])
    texts, scores = [], []
    for completion in fields["completions"]:
        score = next((completion[name] for name in SCORE_FIELDS if completion.get(name) is not None), None)
        text = completion.get("response", completion.get("text", completion.get("content")))
        if score is None or not isinstance(text, str):
            raise RowFault(f"a completion has no response or none of {', '.join(SCORE_FIELDS)}")
        texts.append(text)
        scores.append(float(score))
    order = sorted(set(scores), reverse=True)
    return _ranking(fields, prompt, texts, [1 + order.index(score) for score in scores])


# name: the fields that make a row one, and how it is read; the first that fits counts.
FORMATS: Mapping[str, tuple[set[str], Callable[[Mapping[str, Any]], Any]]] = {
    "ranking": ({"responses", "ranking"}, lambda fields: ranking_from_record(dict(fields))),
    "preference": ({"chosen", "rejected"}, _from_pair),
    "label": ({"prompt", "completion", "label"}, _from_label),
    "ratings": ({"completions"}, _from_ratings),
    "conversation": ({"messages"}, _from_messages),
    "ShareGPT conversation": ({"conversations"}, _from_sharegpt),
    "Alpaca conversation": ({"instruction", "output"}, _from_alpaca),
    "prompt and completion": ({"prompt", "completion"}, _from_prompt_completion),
    "prompt": ({"prompt"}, _from_prompt),
    "text": ({"text"}, lambda fields: fields["text"]),
}
CONVERSATION_FORMATS = ("conversation", "ShareGPT conversation", "Alpaca conversation", "prompt and completion")
RANKING_FORMATS = ("ranking", "preference", "label", "ratings")
