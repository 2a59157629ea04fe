"""What a row is, by its fields: a text, a conversation, a preference or a prompt, in the formats that the field uses.

| format | fields |
|---|---|
| ranking | prompt, responses, ranking (see `lm.data.preferences`) |
| preference | chosen, rejected; prompt, or what both begin with; margin, or score_chosen and score_rejected |
| label | prompt, completion, label: whether the completion is good (KTO) |
| ratings | prompt or instruction, completions: {response, score} each (UltraFeedback), or with a list of ratings |
| conversation | messages (role, content); conversations (from, value: ShareGPT); prompt, completion;
  instruction, input, output, history (Alpaca) |
| prompt | prompt, or messages that end with the user's; every other field goes to the reward |
| text | text |

A prompt, completion, chosen or rejected is a string or a list of messages; `system` comes before them. The right
answer is always called `answer`: verl's `reward_model.ground_truth` and open-instruct's `ground_truth` are given so,
too. Other names for a field: `columns`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm.data.bad_rows import BadRows, renamed_fields
from lm.data.conversations import Conversation
from lm.data.files import SourceRow, source_rows
from lm.data.messages import RowFault, checked_conversation, list_value, name_of_row, prompt_messages, with_system
from lm.data.preference_formats import LABELS, ranking_of_label, ranking_of_pair, ranking_of_ratings, ranking_of_record
from lm.data.preferences import Ranking

PROMPT_FIELDS = ("messages", "prompt", "conversations", "instruction", "input", "system")  # no fields of a reward


class RecognizedRow(NamedTuple):
    """A row and what it is."""

    format: str
    value: str | Conversation | Ranking


def recognized_rows(
    source: str, wanted: Sequence[str], *, columns: Mapping[str, str], bad_rows: BadRows
) -> Iterator[RecognizedRow]:
    """The rows of a source that are of a `wanted` format; any other row is a bad one, as is one with a fault.

    columns: our field -> theirs.
    """
    for row in source_rows(source):
        try:
            recognized = recognized_row(row, columns, wanted=wanted)
            if recognized.format not in wanted:
                needed = " or ".join(wanted)
                raise RowFault(
                    f"it is a {recognized.format}, and {needed} is needed here: {_way_out(recognized.format)}"
                )
        except RowFault as fault:
            bad_rows.add(row.place, fault)
            continue
        yield recognized


def _way_out(format: str) -> str:
    if format == "prompt":
        return "name the reply's field, as in data.columns={'completion': 'answer'}"
    return "take another stage, or name its fields in data.columns"


def recognized_row(
    row: SourceRow,
    columns: Mapping[str, str] = {},  # noqa: B006
    *,
    wanted: Sequence[str] = (),
) -> RecognizedRow:
    """What a row is; where it may be several, one of the `wanted` formats. RowFault says what is wrong with it."""
    if row.fault:
        raise RowFault(row.fault)
    fields = renamed_fields(row.fields, columns)
    name = format_of_fields(frozenset(fields), tuple(wanted))
    if name is None:
        has = ", ".join(sorted(map(str, fields))) or "none"
        raise RowFault(
            f"its fields ({has}) are of no known format: name yours in data.columns, as in {{'prompt': 'question'}}"
        )
    try:
        value = FORMATS[name][1](fields)
    except RowFault:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RowFault(f"no {name} ({error}): mend or remove it") from error
    if isinstance(value, Conversation) and all(message["role"] != "assistant" for message in value.messages):
        return RecognizedRow("prompt", value)
    return RecognizedRow(name, value)


@functools.lru_cache(maxsize=256)  # the rows of a file have few sets of fields
def format_of_fields(fields: frozenset[str], wanted: tuple[str, ...]) -> str | None:
    """The format that has these fields, one of the `wanted` where several do; None for none."""
    for name in (*(name for name in FORMATS if name in wanted), *FORMATS):
        if any(names <= fields for names in FORMATS[name][0]):
            return name
    return None


def _conversation(fields: Mapping[str, Any], messages: list[dict], used: Sequence[str] = ()) -> Conversation:
    other_fields = {name: value for name, value in fields.items() if name not in (*PROMPT_FIELDS, *used)}
    return Conversation(name_of_row(fields, messages), messages, _with_answer(other_fields), is_whole=True)


def _with_answer(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with the right answer under our name, too: verl has it in `reward_model`, open-instruct in
    `ground_truth`, often a list of one."""
    if "answer" in fields:
        return dict(fields)
    answer = fields["ground_truth"] if "ground_truth" in fields else None
    judged = fields["reward_model"] if "reward_model" in fields else None
    if isinstance(judged, Mapping) and "ground_truth" in judged:
        answer = judged["ground_truth"]
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return dict(fields) if answer is None else {**fields, "answer": answer}


def _from_messages(fields: Mapping[str, Any], name: str = "messages") -> Conversation:
    messages = list_value(fields[name])
    if isinstance(messages, str):
        raise RowFault(f"{name} is {messages!r:.60}, not a list of messages")
    return _conversation(fields, checked_conversation(with_system(fields, messages)))


def _from_sharegpt(fields: Mapping[str, Any]) -> Conversation:
    return _from_messages(fields, "conversations")


def _from_alpaca(fields: Mapping[str, Any]) -> Conversation:
    more = fields["input"] if "input" in fields and isinstance(fields["input"], str) else ""
    question = f"{fields['instruction']}\n\n{more}" if more.strip() else fields["instruction"]
    messages = []
    for asked, answer in list_value(fields["history"]) if "history" in fields else ():
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, "train": False}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": fields["output"]}]
    return _conversation(fields, checked_conversation(with_system(fields, messages)), ("output", "history"))


def _from_prompt_completion(fields: Mapping[str, Any]) -> Conversation:
    if "label" in fields and str(fields["label"]).lower() in LABELS:
        raise RowFault("its label says whether the completion is good: take stage kto, or leave the label out")
    completion = list_value(fields["completion"])
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    prompt = prompt_messages(with_system(fields, fields["prompt"]))
    return _conversation(fields, checked_conversation([*prompt, *completion]), ("completion",))


def _from_prompt(fields: Mapping[str, Any]) -> Conversation:
    return _conversation(fields, prompt_messages(with_system(fields, fields["prompt"])))


def _text(fields: Mapping[str, Any]) -> str:
    if not isinstance(fields["text"], str):
        raise RowFault(f"text is {fields['text']!r:.60}, not a text")
    return fields["text"]


# name: the fields that make a row one, in one of these sets, and how it is read; the first that fits counts.
FORMATS: Mapping[str, tuple[tuple[set[str], ...], Callable[[Mapping[str, Any]], Any]]] = {
    "ranking": (({"responses", "ranking"},), ranking_of_record),
    "preference": (({"chosen", "rejected"},), ranking_of_pair),
    "label": (({"prompt", "completion", "label"},), ranking_of_label),
    "ratings": (
        tuple(
            {asked, *answers}
            for asked in ("prompt", "instruction")
            for answers in (("completions",), ("responses", "ratings"), ("responses", "scores"))
        ),
        ranking_of_ratings,
    ),
    "conversation": (({"messages"},), _from_messages),
    "ShareGPT conversation": (({"conversations"},), _from_sharegpt),
    "Alpaca conversation": (({"instruction", "output"},), _from_alpaca),
    "prompt and completion": (({"prompt", "completion"},), _from_prompt_completion),
    "prompt": (({"prompt"},), _from_prompt),
    "text": (({"text"},), _text),
}
CONVERSATION_FORMATS = ("conversation", "ShareGPT conversation", "Alpaca conversation", "prompt and completion")
RANKING_FORMATS = ("ranking", "preference", "label", "ratings")
