"""Chat templates as Hugging Face writes them: Jinja, run in a sandbox. Their output depends on their input alone:
the date that they show is the tokenizer's, its names are English in every locale, and nothing in them is random."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lm.core.errors import UserError
from lm.tokenizer.base import Message, message_weight

PROBE_MESSAGES = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


DAY_NAMES = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTH_NAMES = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")
MONTH_NAMES += ("November", "December")
COMPOSED_FORMATS = {"%c": "%a %b %e %H:%M:%S %Y", "%x": "%m/%d/%y", "%X": "%H:%M:%S", "%h": "%b"}  # as in the C locale


class RenderedChat(NamedTuple):
    text: str
    assistant_spans: list[tuple[int, int]]  # characters [begin, end) of what the assistant said, end token and all


class ChatTemplate:
    """A chat template with the special tokens that it may name, and the time that its strftime_now gives.

    moment: ISO 8601, such as "2024-05-01"; empty: the time at which this object was made.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], moment: str = ""):
        now = datetime.fromisoformat(moment) if moment else datetime.now()
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {
            "raise_exception": _raise_template_error,
            "strftime_now": lambda form: formatted_time(now, form),
        }
        del environment.filters["random"], environment.globals["lipsum"]
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template does not parse ({error}): take that of another release") from error
        self._tokens = dict(tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as text. add_generation_prompt: with the marker after which the assistant answers. tools:
        JSON descriptions that the template may show."""
        given = dict(
            messages=[{key: value for key, value in m.items() if key != "weight"} for m in messages],
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=None,
        )
        try:
            return self._template.render(**given, **self._tokens)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses this conversation: {error}") from error

    def render_with_spans(self, messages: Sequence[Message], *, last: bool = False) -> RenderedChat:
        """The whole as text, and where the assistant speaks: what follows the marker, up to the next message.

        `last`: in the last message alone. UserError where the template rewrites earlier turns depending on later
        ones, or a question depending on its answer: then no mask fits both.
        """
        text, spans = self.render(messages, add_generation_prompt=False), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or last and i + 1 < len(messages):
                continue
            before, after = (
                self.render(messages[:i], add_generation_prompt=True),
                self.render(messages[: i + 1], add_generation_prompt=False),
            )
            if not text.startswith(before) and i + 1 == len(messages):
                raise UserError(
                    "the chat template writes an answer that is there otherwise than it asks for one, so that no mask "
                    "parts question and answer: take another template"
                )
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                raise UserError(
                    "the chat template rewrites earlier answers when later ones come, so they cannot be masked: "
                    "cut conversations to one answer (data.turns), or take another template"
                )
            spans.append((len(before), len(after), message_weight(message)))
        return RenderedChat(text, spans)


def formatted_time(moment: datetime, form: str) -> str:
    """moment.strftime(form) with the names of the C locale, whatever locale the process has."""
    names = {
        "%A": DAY_NAMES[moment.weekday()],
        "%a": DAY_NAMES[moment.weekday()][:3],
        "%B": MONTH_NAMES[moment.month - 1],
        "%b": MONTH_NAMES[moment.month - 1][:3],
        "%p": "AM" if moment.hour < 12 else "PM",
    }
    for known in (COMPOSED_FORMATS, names):
        form = re.sub("%.", lambda found: known.get(found[0], found[0]), form, flags=re.DOTALL)  # noqa: B023
    return moment.strftime(form)


def _raise_template_error(message: str):
    raise jinja2.TemplateError(message)
