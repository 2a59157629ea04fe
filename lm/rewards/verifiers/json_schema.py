"""A verifier of JSON: a document that a schema accepts."""

import functools
import json
import math
import re
from typing import Any

import jsonschema
import referencing

from lm.rewards.verifiers.answer_field import answer_reward

FENCE = re.compile(r"```(?:json)?[ \t]*\n(?P<inside>.*)\n?```", re.DOTALL | re.IGNORECASE)
LONGEST_DOCUMENT = 100_000  # characters


def strict_json(text: str) -> Any:
    """The value of a JSON document. ValueError for NaN, Infinity, 1e400, a key given twice, or text around it."""

    def number(digits: str) -> float:
        if not math.isfinite(float(digits)):
            raise ValueError(f"{digits} is too large")
        return float(digits)

    def refuse_constant(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is given twice")
        return dict(pairs)

    if len(text) > LONGEST_DOCUMENT:
        raise ValueError("it is too long")
    try:
        return json.loads(text, parse_float=number, parse_constant=refuse_constant, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@functools.lru_cache(maxsize=1024)
def _validator(schema: str) -> jsonschema.protocols.Validator:
    """The validator of a schema in JSON text, of the draft that it names, else of 2020-12. No $ref is downloaded."""
    try:
        parsed = strict_json(schema)
        made = jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator)
        made.check_schema(parsed)
    except jsonschema.SchemaError as error:
        raise ValueError(f"it is no JSON schema ({error.message})") from error
    return made(parsed, registry=referencing.Registry())


@answer_reward
def json_schema_reward(truth: Any, text: str) -> bool:
    """Whether the whole text, or all of it inside one ```json fence, is JSON that the schema `answer` accepts.

    The schema is a mapping or its JSON text, of any draft that jsonschema knows (json-schema.org). JSON is strict: no
    NaN or Infinity, no number beyond float64, no key twice. `format` is not checked.
    """
    if not isinstance(truth, dict | str | bool):
        raise ValueError("it must be a JSON schema: a mapping, or its JSON text")
    validator = _validator(truth if isinstance(truth, str) else json.dumps(truth))
    fenced = FENCE.fullmatch(text.strip())
    try:
        document = strict_json(fenced["inside"] if fenced else text)
    except ValueError:
        return False
    try:
        return validator.is_valid(document)
    except referencing.exceptions.Unresolvable as error:
        raise ValueError(f"its $ref cannot be resolved ({error})") from error
    except RecursionError:
        return False
