"""Rows that cannot be used: why, how many are tolerated, and fields that a user calls by other names."""

import logging
from collections.abc import Mapping
from typing import Any

from lm.core.errors import UserError


class RowFault(ValueError):
    """Why a row cannot be used, in words that follow its place."""


class BadRows:
    """Tolerates `limit` bad rows of one source, then raises: the count, and the faults for a report."""

    def __init__(self, limit: int):
        self.limit, self.faults = limit, []

    def warn(self, source: str, used: int) -> None:
        """Says how many rows of a source were passed over, if any; `used`: how many were not."""
        if self.faults:
            message, count = "%s: passed over %d bad rows of %d; the first: %s", len(self.faults)
            logging.getLogger(__name__).warning(message, source, count, used + count, self.faults[0])

    def add(self, place: str, fault: object) -> None:
        self.faults.append(f"{place}: {fault}")
        if len(self.faults) > self.limit:
            more = f" (data.skip_bad_rows is {self.limit})" if self.limit else ""
            raise UserError(f"{self.faults[-1]}; or set data.skip_bad_rows to pass over bad rows{more}")


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
