"""Reads JSON byte by byte and says which byte may come next: an acceptor for a schema, with a stack as its state.

The state is a tuple of frames, hashable, so that what may follow it is found once and kept. A value that is complete
leaves the stack; an empty stack is a whole document. Everything accepted is JSON in UTF-8 that fits the schema. Not
everything that fits is accepted: there is at most one space before a value or a key, numbers have at most MAX_DIGITS
digits in a row, exponents MAX_EXPONENT_DIGITS, and values are nested at most MAX_DEPTH deep, so that no model writes
blanks, digits or brackets for ever.
"""

from typing import Any, NamedTuple

from lm.serve.json_schema import ANY, ANY_OBJECT, NONE, SchemaNode, SchemaTable

MAX_DEPTH = 32
MAX_DIGITS = 15  # what a float holds exactly
MAX_EXPONENT_DIGITS = 2
SPACE, QUOTE, BACKSLASH, COMMA, COLON = b' "\\,:'
DIGITS, NONZERO, HEX = frozenset(b"0123456789"), frozenset(b"123456789"), frozenset(b"0123456789abcdefABCDEF")
ESCAPED = frozenset(b'"\\/bfnrt')


class ValueFrame(NamedTuple):
    node: int
    spaced: bool = False  # whether the space before it was written


class StringFrame(NamedTuple):
    """phase: "" in the text; "\\" after a backslash; "u0" to "u3", the digits of an escape, "s1" after a first d, which
    begins a surrogate; "1" to "3", the bytes that a character lacks."""

    phase: str = ""


class NumberFrame(NamedTuple):
    """phase: "-", "0", "int", ".", "frac", "e", "e+", "exp"; the digits of the part."""

    phase: str
    integer: bool
    digits: int = 0


class LiteralFrame(NamedTuple):
    choices: tuple[bytes, ...]  # those that begin with what is written
    written: int


class ArrayFrame(NamedTuple):
    node: int
    count: int = 0
    phase: str = "first"  # "first", "next" after a comma, "after" a value


class ObjectFrame(NamedTuple):
    """phase: "first", "next" after a comma, "after" a value, "key" within one of a declared object, "colon"."""

    node: int
    seen: int = 0  # a bit of each key that is there
    phase: str = "first"
    key: bytes = b""  # so far
    value: int = ANY  # the node of the value after the colon
    spaced: bool = False


State = tuple[Any, ...]
COMPLETE_NUMBERS = ("0", "int", "frac", "exp")


class JsonGrammar:
    """The JSON values of a schema. schema None: any object."""

    def __init__(self, schema: Any = None):
        if schema is None:
            self._nodes, root = [SchemaTable(True).nodes[0], ANY_OBJECT], 1
        else:
            table = SchemaTable(schema)
            self._nodes, root = table.nodes, table.root
        self.start: State = (ValueFrame(root),)

    def is_complete(self, state: State) -> bool:
        """Whether what was read is a whole document: a number may still go on."""
        if len(state) > 1:
            return False
        return not state or _can_end(state[0])

    def after(self, state: State, byte: int) -> State | None:
        """The state after one more byte; None if it may not come."""
        while state:
            *below, frame = state
            if isinstance(frame, (NumberFrame, LiteralFrame)):
                moved = _number(frame, byte) if isinstance(frame, NumberFrame) else _literal(frame, byte)
                if moved is not None:
                    return (*below, moved) if not _is_closed(moved) else tuple(below)
                if not _can_end(frame):
                    return None
                state = tuple(below)  # the value ended before this byte
                continue
            if isinstance(frame, StringFrame):
                if frame.phase == "" and byte == QUOTE:
                    return tuple(below)
                moved = _string(frame.phase, byte)
                return None if moved is None else (*below, StringFrame(moved))
            if isinstance(frame, ValueFrame):
                return self._open_value(tuple(below), frame, byte)
            if isinstance(frame, ArrayFrame):
                return self._array(tuple(below), frame, byte)
            return self._object(tuple(below), frame, byte)
        return None

    def _open_value(self, below: State, frame: ValueFrame, byte: int) -> State | None:
        """A value begins."""
        if byte == SPACE:
            return None if frame.spaced else (*below, frame._replace(spaced=True))
        node = self._nodes[frame.node]
        choices = tuple(text for text in node.literals if text[0] == byte)
        if choices:
            literal = LiteralFrame(choices, 1)
            return below if _is_closed(literal) else (*below, literal)
        kinds = node.kinds
        for option in node.options:
            opened = self._open_value(below, ValueFrame(option, spaced=True), byte)
            if opened is not None:
                return opened
        if byte == QUOTE and "string" in kinds:
            return (*below, StringFrame())
        if byte in b"{[" and len(below) >= MAX_DEPTH:
            return None
        if byte == ord("{") and "object" in kinds:
            return (*below, ObjectFrame(frame.node))
        if byte == ord("[") and "array" in kinds:
            return (*below, ArrayFrame(frame.node))
        if byte in b"tf" and "boolean" in kinds:
            return (*below, LiteralFrame((b"true",) if byte == ord("t") else (b"false",), 1))
        if byte == ord("n") and "null" in kinds:
            return (*below, LiteralFrame((b"null",), 1))
        if kinds & {"number", "integer"} and (byte in DIGITS or byte == ord("-")):
            phase = "-" if byte == ord("-") else "0" if byte == ord("0") else "int"
            return (*below, NumberFrame(phase, "number" not in kinds, 1))
        return None

    def _array(self, below: State, frame: ArrayFrame, byte: int) -> State | None:
        node = self._nodes[frame.node]
        full = node.max_items >= 0 and frame.count >= node.max_items
        if byte == ord("]") and frame.phase != "next" and frame.count >= node.min_items:
            return below
        if frame.phase == "after":
            return (*below, frame._replace(phase="next")) if byte == COMMA and not full else None
        if full:
            return None
        enough = max(node.min_items, node.max_items)  # beyond, the count makes no difference
        grown = frame._replace(count=min(frame.count + 1, enough + (node.max_items < 0)), phase="after")
        return self._open_value((*below, grown), ValueFrame(node.items), byte)

    def _object(self, below: State, frame: ObjectFrame, byte: int) -> State | None:
        node = self._nodes[frame.node]
        if frame.phase == "colon":
            if byte != COLON:
                return None
            after = ObjectFrame(frame.node, frame.seen, "after")
            return (*below, after, ValueFrame(frame.value))
        if frame.phase == "key":
            return self._key(below, frame, node, byte)
        complete = frame.seen & node.required == node.required
        if byte == ord("}") and frame.phase != "next" and complete:
            return below
        has_more = node.additional != NONE or frame.seen != (1 << len(node.keys)) - 1
        if not has_more:
            return None
        if frame.phase == "after":
            return (*below, frame._replace(phase="next")) if byte == COMMA else None
        if byte == SPACE:
            return None if frame.spaced else (*below, frame._replace(spaced=True))
        if byte != QUOTE:
            return None
        if not node.keys:  # any key at all
            return (*below, ObjectFrame(frame.node, 0, "colon", value=node.additional), StringFrame())
        return (*below, ObjectFrame(frame.node, frame.seen, "key", b'"'))

    def _key(self, below: State, frame: ObjectFrame, node: SchemaNode, byte: int) -> State | None:
        """A key of an object that declares some."""
        key = frame.key + bytes([byte])
        for i, declared in enumerate(node.keys):
            if declared == key:
                if frame.seen >> i & 1:
                    return None
                return (*below, ObjectFrame(frame.node, frame.seen | 1 << i, "colon", value=node.values[i]))
        if any(declared.startswith(key) and not frame.seen >> i & 1 for i, declared in enumerate(node.keys)):
            return (*below, frame._replace(key=key))
        if node.additional == NONE or byte == BACKSLASH or byte < 0x20:  # an escape could spell a declared key
            return None
        if byte == QUOTE:
            if not _is_utf8(key):
                return None
            return (*below, ObjectFrame(frame.node, frame.seen, "colon", value=node.additional))
        return (*below, frame._replace(key=key))


def _can_end(frame: Any) -> bool:
    """Whether the value is whole, though more of it may follow."""
    if isinstance(frame, NumberFrame):
        return frame.phase in COMPLETE_NUMBERS
    return isinstance(frame, LiteralFrame) and any(len(choice) == frame.written for choice in frame.choices)


def _is_closed(frame: Any) -> bool:
    """Whether the value is whole and nothing more of it can follow."""
    return isinstance(frame, LiteralFrame) and all(len(choice) == frame.written for choice in frame.choices)


def _literal(frame: LiteralFrame, byte: int) -> LiteralFrame | None:
    n = frame.written
    choices = tuple(choice for choice in frame.choices if len(choice) > n and choice[n] == byte)
    return LiteralFrame(choices, n + 1) if choices else None


def _number(frame: NumberFrame, byte: int) -> NumberFrame | None:
    phase, integer, digits = frame
    if byte in DIGITS:
        if phase == "-":
            return NumberFrame("0" if byte == ord("0") else "int", integer, 1)
        if phase == "0":
            return None
        part = {".": "frac", "e": "exp", "e+": "exp"}[phase] if phase in (".", "e", "e+") else phase
        most = MAX_EXPONENT_DIGITS if part == "exp" else MAX_DIGITS
        return NumberFrame(part, integer, digits + 1) if digits < most else None
    if integer:
        return None
    if byte == ord(".") and phase in ("0", "int"):
        return NumberFrame(".", integer)
    if byte in b"eE" and phase in ("0", "int", "frac"):
        return NumberFrame("e", integer)
    return NumberFrame("e+", integer) if byte in b"+-" and phase == "e" else None


def _string(phase: str, byte: int) -> str | None:
    """The phase after a byte that does not end the string."""
    if phase == "":
        if byte == BACKSLASH:
            return "\\"
        if byte < 0x80:
            return "" if byte >= 0x20 else None
        return "1" if 0xC2 <= byte < 0xE0 else "2" if 0xE0 <= byte < 0xF0 else "3" if 0xF0 <= byte < 0xF5 else None
    if phase in ("1", "2", "3"):
        if not 0x80 <= byte < 0xC0:
            return None
        return str(int(phase) - 1).replace("0", "")
    if phase == "\\":
        return "u0" if byte == ord("u") else "" if byte in ESCAPED else None
    if byte not in HEX:
        return None
    if phase == "u0":
        return "s1" if byte in b"dD" else "u1"
    if phase == "s1":
        return "u2" if byte in b"01234567" else None  # d8 to df begin half a character
    return "u3" if phase == "u2" else "u2" if phase == "u1" else ""


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
        return True
    except UnicodeDecodeError:
        return False
