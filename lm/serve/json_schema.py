"""JSON schemas as a table of nodes that a byte-by-byte reader (lm.serve.json_grammar) follows.

Supported: type (one or several), properties, required, additionalProperties, enum, const, items, minItems, maxItems,
anyOf of values that differ in their first character, $ref to $defs or definitions of the same schema. Titles,
descriptions, defaults and examples are read over. Any other keyword is refused: a schema that is followed in part would
promise what it does not hold.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm.core.errors import UserError

KINDS = ("object", "array", "string", "number", "integer", "boolean", "null")
IGNORED_KEYWORDS = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"}
READ_KEYWORDS = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "enum",
    "const",
    "items",
    "minItems",
    "maxItems",
    "anyOf",
    "$ref",
    "$defs",
    "definitions",
}
OPENING_BYTES = {
    "object": b"{",
    "array": b"[",
    "string": b'"',
    "number": b"-0123456789",
    "integer": b"-0123456789",
    "boolean": b"tf",
    "null": b"n",
}
ANY = 0  # the node of any value
NONE = -1  # where a node's number stands: there is none


class SchemaNode(NamedTuple):
    """What a value may be: one of `literals`, any of the `kinds`, or what one of the nodes `options` may be."""

    kinds: frozenset[str]
    literals: tuple[bytes, ...] = ()  # of enum and const, as JSON
    options: tuple[int, ...] = ()  # of anyOf; no two of them begin with the same byte
    keys: tuple[bytes, ...] = ()  # of an object, as JSON, quotes included
    values: tuple[int, ...] = ()  # the node of each
    required: int = 0  # a bit of each key
    additional: int = ANY  # the node of other keys' values; NONE: no other key
    items: int = ANY  # the node of an array's values
    min_items: int = 0
    max_items: int = -1  # -1: no bound


ANY_NODE = SchemaNode(frozenset(KINDS) - {"integer"})
ANY_OBJECT = SchemaNode(frozenset({"object"}))


class SchemaTable:
    """The nodes of one schema; `root` is the number of its own. UserError for a schema that is not supported."""

    def __init__(self, schema: Any):
        self._schema = schema
        self._refs: dict[str, int] = {}
        self.nodes: list[SchemaNode] = [ANY_NODE]
        self._choices: list[tuple[str, list[int]]] = []
        self.root = self._add_schema(schema, "schema")
        for place, options in self._choices:
            begun = [self._openings(number) for number in options]
            if sum(map(len, begun)) > len(frozenset().union(*begun)):
                raise UserError(
                    f"{place}.anyOf has schemas whose values may begin alike, which is not supported: "
                    "give each another type"
                )

    def _add_schema(self, schema: Any, place: str) -> int:
        if schema is True or schema == {}:
            return ANY
        if not isinstance(schema, Mapping):
            raise UserError(f"{place} is {schema!r:.60}; a schema must be an object or true")
        for keyword in schema:
            if keyword not in READ_KEYWORDS | IGNORED_KEYWORDS:
                raise UserError(
                    f"{place} has the keyword {keyword!r}, which constrained answers do not support: leave it out; "
                    f"supported are {', '.join(sorted(READ_KEYWORDS))}"
                )
        if "$ref" in schema:
            return self._add_reference(schema, place)
        number = len(self.nodes)
        self.nodes.append(ANY_NODE)  # its place, as it may refer to itself
        self.nodes[number] = self._node(schema, place)
        return number

    def _add_reference(self, schema: Mapping[str, Any], place: str) -> int:
        """The node of a $ref, which is compiled once, so that a schema may refer to itself."""
        beside = sorted(set(schema) - IGNORED_KEYWORDS - {"$ref", "$defs", "definitions"})
        if beside:
            raise UserError(f"{place} has {beside[0]!r} beside $ref, which is not supported: leave one of them out")
        ref = schema["$ref"]
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise UserError(f"{place}.$ref is {ref!r}; it must name a part of the same schema, as #/$defs/NAME")
        if ref in self._refs:
            return self._refs[ref]
        target = self._schema
        for part in ref.removeprefix("#").strip("/").split("/") if ref.strip("#/") else ():
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, Mapping) or part not in target:
                raise UserError(f"{place}.$ref is {ref!r}, which the schema does not have")
            target = target[part]
        if isinstance(target, Mapping) and "$ref" in target:
            raise UserError(f"{place}.$ref is {ref!r}, which is a $ref itself: name the schema it stands for")
        self._refs[ref] = len(self.nodes)
        self.nodes.append(ANY_NODE)
        number = self._refs[ref]
        self.nodes[number] = self.nodes[self._add_schema(target, ref)]
        return number

    def _node(self, schema: Mapping[str, Any], place: str) -> SchemaNode:
        if "anyOf" in schema:
            return self._alternatives(schema, place)
        kinds = self._kinds(schema, place)
        if "enum" in schema or "const" in schema:
            return self._literal_node(schema, kinds, place)
        node = SchemaNode(kinds)
        if "object" in kinds:
            node = self._with_properties(node, schema, place)
        if "array" in kinds:
            node = self._with_items(node, schema, place)
        return node

    def _kinds(self, schema: Mapping[str, Any], place: str) -> frozenset[str]:
        if "type" not in schema:
            if "properties" in schema or "required" in schema:
                return frozenset({"object"})
            return frozenset({"array"}) if "items" in schema else ANY_NODE.kinds
        given = schema["type"]
        named = [given] if isinstance(given, str) else given
        if not isinstance(named, list) or not named or not all(kind in KINDS for kind in named):
            raise UserError(f"{place}.type is {given!r}; it must be one or several of {', '.join(KINDS)}")
        return frozenset(named) - ({"integer"} if "number" in named else set())

    def _literal_node(self, schema: Mapping[str, Any], kinds: frozenset[str], place: str) -> SchemaNode:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, list) or not values:
            raise UserError(f"{place}.enum is {values!r:.60}; it must be a list of at least one value")
        if "const" in schema:
            values = [value for value in values if value == schema["const"] and type(value) is type(schema["const"])]
        kept = [
            value for value in values if kind_of(value) in kinds or kind_of(value) == "integer" and "number" in kinds
        ]
        if not kept:
            raise UserError(f"{place}.enum has no value of its type: add one")
        texts = dict.fromkeys(json.dumps(value, ensure_ascii=False).encode() for value in kept)
        return SchemaNode(frozenset(), literals=tuple(texts))

    def _with_properties(self, node: SchemaNode, schema: Mapping[str, Any], place: str) -> SchemaNode:
        properties = schema["properties"] if "properties" in schema else {}
        if not isinstance(properties, Mapping):
            raise UserError(f"{place}.properties is {properties!r:.60}; it must be an object of schemas")
        required = schema["required"] if "required" in schema else []
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise UserError(f"{place}.required is {required!r:.60}; it must be a list of names")
        unknown = [name for name in required if name not in properties]
        if unknown:
            raise UserError(f"{place}.required names {unknown[0]!r}, which is not among its properties: add it there")
        keys = tuple(json.dumps(name, ensure_ascii=False).encode() for name in properties)
        values = tuple(self._add_schema(value, f"{place}.properties.{name}") for name, value in properties.items())
        bits = sum(1 << i for i, name in enumerate(properties) if name in required)
        # Without the keyword, a declared object gets no further keys: what is written is valid all the same.
        given = schema["additionalProperties"] if "additionalProperties" in schema else not properties
        additional = NONE if given is False else self._add_schema(given, f"{place}.additionalProperties")
        return node._replace(keys=keys, values=values, required=bits, additional=additional)

    def _with_items(self, node: SchemaNode, schema: Mapping[str, Any], place: str) -> SchemaNode:
        items = self._add_schema(schema["items"], f"{place}.items") if "items" in schema else ANY
        least = schema["minItems"] if "minItems" in schema else 0
        most = schema["maxItems"] if "maxItems" in schema else -1
        for name, count in (("minItems", least), ("maxItems", most)):
            if name in schema and (type(count) is not int or count < 0):
                raise UserError(f"{place}.{name} is {count!r}; it must be a whole number from 0 up")
        if 0 <= most < least:
            raise UserError(f"{place}.minItems is {least}, above maxItems, which is {most}: swap them")
        return node._replace(items=items, min_items=least, max_items=most)

    def _alternatives(self, schema: Mapping[str, Any], place: str) -> SchemaNode:
        """A node of several, which must differ in their first byte."""
        beside = sorted(set(schema) - IGNORED_KEYWORDS - {"anyOf", "$defs", "definitions"})
        if beside:
            raise UserError(f"{place} has {beside[0]!r} beside anyOf, which is not supported: leave one of them out")
        given = schema["anyOf"]
        if not isinstance(given, list) or not given:
            raise UserError(f"{place}.anyOf is {given!r:.60}; it must be a list of schemas")
        options = [self._add_schema(one, f"{place}.anyOf[{i}]") for i, one in enumerate(given)]
        nodes = [self.nodes[number] for number in options]
        if all(node.literals for node in nodes):
            return SchemaNode(frozenset(), literals=tuple(text for node in nodes for text in node.literals))
        self._choices.append((place, options))  # compared once all are compiled
        return SchemaNode(frozenset(), options=tuple(options))

    def _openings(self, number: int, above: frozenset[int] = frozenset()) -> frozenset[int]:
        """The bytes with which a value of this node may begin."""
        node = self.nodes[number]
        if number in above:
            raise UserError("schema: a $ref in anyOf leads back to itself: give the value a type")
        begun = b"".join([OPENING_BYTES[kind] for kind in node.kinds] + [text[:1] for text in node.literals])
        return frozenset(begun).union(*(self._openings(option, above | {number}) for option in node.options))


def kind_of(value: Any) -> str:
    """The JSON type of a value as json.loads gives it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"
