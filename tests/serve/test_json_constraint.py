"""Constrained answers: what is accepted is JSON of the schema, what a schema asks beyond the supported is refused."""

import json
import random

import jsonschema
import numpy as np
import pytest

from lm.core.errors import UserError
from lm.serve.json_constraint import JsonVocabulary
from lm.serve.json_grammar import JsonGrammar
from lm.tokenizer import train_tokenizer

TEXT = 'The {"name": "Ann", "age": 12, "tags": ["a", "b"], "ok": true, "none": null} x é 日本 😀 \\ \n'
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "mood": {"enum": ["good", "goodish", 1, 12, None]},
        "tags": {"type": "array", "items": {"type": ["string", "null"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
NESTED = {
    "$defs": {
        "Tree": {
            "properties": {
                "value": {"type": "number"},
                "next": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}]},
            },
            "required": ["value"],
        }
    },
    "$ref": "#/$defs/Tree",
}


def accepts(grammar: JsonGrammar, text: str) -> bool:
    state = grammar.start
    for byte in text.encode():
        state = grammar.after(state, byte)
        if state is None:
            return False
    return grammar.is_complete(state)


@pytest.fixture(scope="module")
def vocabulary():
    tokenizer = train_tokenizer([TEXT * 20], vocab_size=330)
    return tokenizer, JsonVocabulary(tokenizer, tokenizer.vocab_size + 3)


@pytest.mark.parametrize(
    "text",
    [
        *('{"name": "x", "tags": ["a"]}', ' {"tags":[null, "b"],"name":""}'),
        '{"name":"\\u00e9\\n","age":-0,"tags":["é"]}',
        *('{"mood": 12, "name": "日本😀", "tags": [""]}', '{"mood": "good", "name": "", "tags": [null]}'),
    ],
)  # fmt: skip
def test_what_fits_is_accepted(text):
    jsonschema.validate(json.loads(text), PERSON)
    assert accepts(JsonGrammar(PERSON), text)


@pytest.mark.parametrize(
    "text",
    [
        *('{"name": "x"}', '{"name": "x", "tags": []}', '{"name": "x", "tags": ["a", "b", "c"]}', "[]", "{", "1"),
        *('{"name": 1, "tags": ["a"]}', '{"name": "x", "tags": ["a"], "more": 1}', '{"name":"a","tags":["a"],}'),
        *('{"name": "x", "name": "y", "tags": ["a"]}', '{"name": "x", "tags": ["a"]} ', '{"name":"a\nb","tags":["a"]}'),
        *('{"age": 1.5, "name": "x", "tags": ["a"]}', '{"age": 01, "name": "x", "tags": ["a"]}', '{"mood":"bad'),
        *('{"name": "\\ud800", "tags": ["a"]}', '{"name": "\\x", "tags": ["a"]}'),
        '{"age": -, "name": "", "tags":[""]}',
    ],
)  # fmt: skip
def test_what_does_not_fit_is_not_accepted(text):
    assert not accepts(JsonGrammar(PERSON), text)


@pytest.mark.parametrize("text", ["1", "-1.5e-3", "0", '"a"', "true", "null", "[1, [2, {}]]", '{"a": {"a": 1}}'])
def test_any_value(text):
    assert accepts(JsonGrammar(True), text)


@pytest.mark.parametrize("text", ["1.", "-", "1e", "01", "tru", "nul", "[1,]", "{,}", "1" * 16, "[" * 40 + "]" * 40])
def test_no_value(text):
    assert not accepts(JsonGrammar(True), text)


def test_invalid_utf8_is_not_accepted():
    grammar = JsonGrammar(True)
    for wrong in (b'"\xff', b'"\x80', b'"\xc3"', b'"\xe6\x97"'):
        state = grammar.start
        for byte in wrong:
            state = state and grammar.after(state, byte)
        assert state is None


def test_a_schema_may_refer_to_itself_and_choose():
    grammar = JsonGrammar(NESTED)
    assert accepts(grammar, '{"value": 1, "next": {"value": 2.5, "next": null}}')
    assert not accepts(grammar, '{"value": 1, "next": {"next": null}}')
    free = JsonGrammar({"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "boolean"}})
    assert accepts(free, '{"b": true, "a": null, "aa": false}')
    assert not accepts(free, '{"b": true, "a": true}') and not accepts(free, '{"\\u0061": true}')


@pytest.mark.parametrize(
    "schema, said",
    [
        ({"type": "string", "pattern": "a"}, "schema has the keyword 'pattern'"),
        ({"properties": {"a": {"minimum": 1}}}, "schema.properties.a has the keyword 'minimum'"),
        ({"type": "text"}, "schema.type is 'text'"),
        ({"anyOf": [{"type": "string"}, {"enum": ["a"]}]}, "begin alike"),
        ({"$ref": "#/$defs/A"}, "which the schema does not have"),
        ({"$ref": "#"}, "which is a $ref itself"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "minItems is 2, above maxItems"),
        ({"type": "array", "maxItems": -1}, "maxItems is -1"),
        ({"required": ["a"]}, "required names 'a'"),
        ({"type": "integer", "enum": ["a"]}, "no value of its type"),
        ([], "must be an object or true"),
    ],
)
def test_what_is_not_supported_is_named(schema, said):
    with pytest.raises(UserError, match=said.replace("$", r"\$").replace("[", r"\[")):
        JsonGrammar(schema)


@pytest.mark.parametrize(
    "schema", [None, PERSON, NESTED, {"type": "array", "items": {"type": "integer"}, "minItems": 2}]
)
def test_random_tokens_under_the_constraint_make_valid_documents(vocabulary, schema):
    """Whatever a model prefers: 30 answers of random tokens, each of which ends and is valid."""
    tokenizer, tokens = vocabulary
    stops = set(tokenizer.stop_ids)
    for seed in range(30):
        draw, constraint, ids = random.Random(seed), tokens.constraint(json.dumps(schema), schema), []
        for _ in range(3000):
            allowed = np.flatnonzero(constraint.allowed()).tolist()
            assert allowed and all(i < tokenizer.vocab_size for i in allowed)
            closing = [i for i in allowed if i in stops or tokens.bytes[i] in (b'"', b"}", b"]", b":", b",")]
            token = draw.choice(closing if closing and draw.random() < 0.4 else allowed)
            if token in stops:
                break
            constraint.accept(token)
            ids.append(token)
        else:
            pytest.fail(f"seed {seed} goes on for ever: {tokenizer.decode(ids)[:200]}")
        value = json.loads(tokenizer.decode(ids))
        jsonschema.validate(value, {"type": "object"} if schema is None else schema)


def test_masks_are_those_of_the_bytes(vocabulary):
    """In a few states: a token is allowed exactly if all its bytes are."""
    tokenizer, tokens = vocabulary
    constraint = tokens.constraint("person", PERSON)
    for token in tokenizer.encode('{"name": "The x", "tags": ["é"'):
        state, mask = constraint._state, constraint.allowed()
        for i, text in enumerate(tokens.bytes):
            after = state if text else None
            for byte in text:
                after = None if after is None else constraint._tokens.grammar.after(after, byte)
            assert mask[i] == (after is not None)
        constraint.accept(token)
    with pytest.raises(UserError, match="not one that the constraint allows"):
        constraint.accept(tokenizer.encode("x{")[0])
