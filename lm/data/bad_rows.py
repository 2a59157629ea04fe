"""Rows that cannot be used: how many are tolerated; and fields that a user calls by other names."""

from collections.abc import Mapping
from typing import Any

from lm.core.errors import UserError, check_at_least
from lm.data.messages import RowFault


class BadRows:
    """Tolerates `limit` bad rows, then raises: the count, and the faults for a report."""

    def __init__(self, limit: int):
        check_at_least(0, "data", skip_bad_rows=limit)
        self.limit, self.faults = limit, []

    def add(self, place: str, fault: object) -> None:
        self.faults.append(f"{place}: {fault}")
        if len(self.faults) > self.limit:
            more = f" (data.skip_bad_rows is {self.limit})" if self.limit else ""
            raise UserError(f"{self.faults[-1]}; or set data.skip_bad_rows to pass over bad rows{more}")


def renamed_fields(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The fields by our names; None, as tables hold it for what is absent, is no field.

    A name with a dot, "reward.truth", is one within an object. A row that has our name and not theirs is taken as it
    is: sources with different names may be mixed.
    """
    kept = {name: value for name, value in fields.items() if name not in columns.values()}
    for ours, theirs in columns.items():
        value = _nested_value(fields, theirs)
        if value is None and ours not in fields:
            raise RowFault(f"it has no field {theirs!r}, which data.columns names for {ours!r}")
        kept[ours] = fields[ours] if value is None else value
    return {name: value for name, value in kept.items() if value is not None}


def _nested_value(fields: Mapping[str, Any], name: str) -> Any:
    if name in fields:
        return fields[name]
    outer, _, inner = name.partition(".")
    within = fields[outer] if inner and outer in fields else None
    return _nested_value(within, inner) if isinstance(within, Mapping) else None
