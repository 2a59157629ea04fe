"""The requests of OpenAI's HTTP interface: read, checked, and turned into what an engine is asked.

Fields beyond OpenAI's: top_k, min_p, repetition_penalty. What this server cannot do is refused with the field's name,
never passed over.
"""

import json
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm.core.config import did_you_mean
from lm.core.errors import UserError
from lm.data.messages import RowFault, checked_conversation
from lm.generate.sampler import SamplingParams

MAX_CHOICES = 16  # n
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_TOP_K = 2**30  # what an i32 holds
ANY_OBJECT = "json_object"
COMMON_FIELDS = {
    *("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "stop", "seed"),
    *("stream", "stream_options", "logprobs", "response_format", "frequency_penalty", "presence_penalty", "logit_bias"),
    *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
}
CHAT_FIELDS = COMMON_FIELDS | {
    *("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"),
    *("store", "reasoning_effort", "verbosity", "modalities"),
}
COMPLETION_FIELDS = COMMON_FIELDS | {"prompt", "echo", "suffix", "best_of"}
LLAMA_FIELDS = {
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "n_probs": "logprobs",
}  # of llama.cpp's own /completion, and ours
LLAMA_IGNORED = ("cache_prompt", "id_slot", "slot_id")  # what its clients send and no answer depends on
UNSUPPORTED = {  # fields of OpenAI, the values at which they do nothing, and the way out
    "frequency_penalty": ((0,), "use repetition_penalty"),
    "presence_penalty": ((0,), "use repetition_penalty"),
    "logit_bias": (({},), "leave it out"),
    "echo": ((False,), "leave it out"),
    "suffix": (("",), "leave it out"),
    "modalities": ((["text"],), "answers are text"),
}


class RequestOptions(NamedTuple):
    """What a request asks, besides its prompt. Values that it leaves out are OpenAI's defaults."""

    model: str  # "" where it names none
    sampling: SamplingParams  # max_new 0: as many tokens as there is room for
    choices: int = 1
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    stream: bool = False
    include_usage: bool = False
    schema_key: str = ""  # of constrained answers: the schema as text; empty: unconstrained
    schema: Any = None  # None: any object


def parsed_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds; fields that are null are left out, as OpenAI's clients mean them."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise UserError("the body is not a JSON object")
    if b"\\u" in body and not is_unicode(given):
        raise UserError("the body has half a character, a lone \\ud800 to \\udfff: send whole ones")
    return {name: value for name, value in given.items() if value is not None}


def is_unicode(value: Any) -> bool:
    """Whether every text in a JSON value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
        return True
    except UnicodeEncodeError:
        return False


def chat_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation to answer. UserError for one that is not valid."""
    if "messages" not in body:
        raise UserError("messages is missing: give a list of {role, content}")
    try:
        messages = checked_conversation(body["messages"])
    except RowFault as fault:
        raise UserError(f"messages: {fault}") from fault
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(f"messages ends with the {messages[-1]['role']}'s: the last must be the user's or a tool's")
    return messages


def requested_tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools that a template shall show; none where tool_choice is "none"."""
    choice = body["tool_choice"] if "tool_choice" in body else "auto"
    if choice not in ("auto", "none"):
        raise UserError(f"tool_choice is {choice!r}: no call can be forced, give auto or none")
    tools = body["tools"] if "tools" in body else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and "function" in tool for tool in tools):
        raise UserError('tools must be a list of {"type": "function", "function": {...}}')
    return tools if choice == "auto" else []


def completion_prompts(body: Mapping[str, Any]) -> list[str | list[int]]:
    """The prompts of /v1/completions, each a text or ids."""
    given = body["prompt"] if "prompt" in body else None
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(type(value) is int for value in given):
            return [given]
        if all(isinstance(value, str) or is_id_list(value) for value in given):
            return given
    raise UserError(f"prompt is {given!r:.60}: give a text, a list of texts, or ids")


def is_id_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)


def llama_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body of llama.cpp's /completion as one of /v1/completions."""
    renamed = {LLAMA_FIELDS[name] if name in LLAMA_FIELDS else name: value for name, value in body.items()}
    kept = {name: value for name, value in renamed.items() if name not in LLAMA_IGNORED}
    for name, off in (("max_tokens", -1), ("seed", -1), ("logprobs", 0)):
        if name in kept and kept[name] == off:
            del kept[name]
    if "json_schema" in kept:
        schema = kept.pop("json_schema")
        kept["response_format"] = {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}
    return kept


def request_options(body: Mapping[str, Any], *, chat: bool, default_max_new: int = 0) -> RequestOptions:
    """The options of a body. UserError names the field, its value and what it may be.

    default_max_new: where it says nothing of tokens; 0: as many as there is room for.
    """
    fields = CHAT_FIELDS if chat else COMPLETION_FIELDS
    for name in body:
        if name not in fields:
            raise UserError(f"{name:.60} is not a field of this request{did_you_mean(name, fields)}")
    for name, (neutral, way_out) in UNSUPPORTED.items():
        if name in body and body[name] not in neutral:
            raise UserError(f"{name} is {body[name]!r:.60}, which is not supported: {way_out}")
    longest = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    choices = number(body, "n", 1, least=1, most=MAX_CHOICES)
    if "best_of" in body and body["best_of"] != choices:
        raise UserError(f"best_of is {body['best_of']!r}, which is not supported beyond n: leave it out")
    logprobs, top = requested_logprobs(body, chat=chat)
    key, schema = requested_schema(body)
    stream_options = body["stream_options"] if "stream_options" in body else {}
    if not isinstance(stream_options, Mapping):
        raise UserError(f"stream_options is {stream_options!r:.60}; it must be an object")
    return RequestOptions(
        model=text(body, "model", ""),
        sampling=SamplingParams(
            number(body, longest, default_max_new, least=1),
            number(body, "temperature", 1.0, least=0, most=100),
            top_k=number(body, "top_k", 0, least=0, most=MAX_TOP_K),
            top_p=number(body, "top_p", 1.0, least=0, most=1),
            min_p=number(body, "min_p", 0.0, least=0, most=1),
            repetition_penalty=number(body, "repetition_penalty", 1.0, least=0.01, most=100),
        ),
        choices=choices,
        seed=number(body, "seed", secrets.randbits(32), least=-(2**63)) % 2**32,
        stop_strings=requested_stops(body),
        logprobs=logprobs,
        top_logprobs=top,
        stream=flag(body, "stream"),
        include_usage=flag(stream_options, "include_usage"),
        schema_key=key,
        schema=schema,
    )


def requested_logprobs(body: Mapping[str, Any], *, chat: bool) -> tuple[bool, int]:
    """(whether, of how many tokens besides the sampled one): chat says both, a completion one number."""
    if not chat:
        count = number(body, "logprobs", -1, least=0, most=MAX_TOP_LOGPROBS)
        return count >= 0, max(count, 0)
    wanted = flag(body, "logprobs")
    count = number(body, "top_logprobs", 0, least=0, most=MAX_TOP_LOGPROBS)
    if count and not wanted:
        raise UserError(f"top_logprobs is {count}, but logprobs is not true: set it")
    return wanted, count


def requested_stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    given = body["stop"] if "stop" in body else []
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise UserError(f"stop is {given!r:.60}; it must be a text or a list of texts, none of them empty")
    if len(stops) > MAX_STOPS:
        raise UserError(f"stop has {len(stops)} texts; at most {MAX_STOPS} may be given")
    return tuple(stops)


def requested_schema(body: Mapping[str, Any]) -> tuple[str, Any]:
    """The key and the schema of response_format; ("", None) for free text."""
    form = body["response_format"] if "response_format" in body else {"type": "text"}
    kind = form["type"] if isinstance(form, Mapping) and "type" in form else None
    if kind == "text":
        return "", None
    if kind == ANY_OBJECT:
        return ANY_OBJECT, None
    if kind != "json_schema":
        raise UserError(f"response_format is {form!r:.60}; its type must be text, json_object or json_schema")
    named = form["json_schema"] if "json_schema" in form else None
    if not isinstance(named, Mapping) or "schema" not in named:
        raise UserError('response_format.json_schema must be {"name": ..., "schema": {...}}')
    return json.dumps(named["schema"]), named["schema"]


def number(body: Mapping[str, Any], name: str, default: Any, *, least: float, most: float = float("inf")) -> Any:
    """The field as a number of the default's type. UserError for anything else."""
    if name not in body:
        return default
    value = body[name]
    whole = isinstance(default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not least <= value <= most:
        bounds = f"from {least:g} to {most:g}" if most < float("inf") else f"of at least {least:g}"
        raise UserError(f"{name} is {value!r:.60}; it must be a {'whole ' if whole else ''}number {bounds}")
    return value if whole else float(value)


def flag(body: Mapping[str, Any], name: str) -> bool:
    value = body[name] if name in body else False
    if not isinstance(value, bool):
        raise UserError(f"{name} is {value!r:.60}; it must be true or false")
    return value


def text(body: Mapping[str, Any], name: str, default: str) -> str:
    value = body[name] if name in body else default
    if not isinstance(value, str):
        raise UserError(f"{name} is {value!r:.60}; it must be a text")
    return value
