"""Fields of a JSON object that somebody else wrote, read with their types."""

from collections.abc import Mapping
from typing import Any

from kvjax.checks import at_least


class Fields:
    """Typed fields of a JSON object; ValueErrors name the file and the field."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} must be a JSON object with fields")
        self.values, self.where = values, where

    def get(self, name: str, *kinds: type | None, default: Any = ...) -> Any:
        """The field's value; where it is absent, Hugging Face's default for the family, if it has one."""
        if name not in self.values:
            if default is ...:
                raise ValueError(f"{self.where}: {name} is missing")
            return default
        value = self.values[name]
        for kind in kinds:
            if (value is None if kind is None else type(value) is kind) or (kind is float and type(value) is int):
                return value
        shown = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
        raise ValueError(f"{self.where}: {name}={value!r} must be of type {shown}")

    def positive(self, name: str, default: Any = ...) -> int:
        """The field's value, an integer of at least 1."""
        value = self.get(name, int, default=default)
        at_least(f"{self.where}: {name}", value, 1)
        return value

    def ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids, given as one, a list or null; none where the field is absent."""
        value = self.get(name, int, list, None, default=None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise ValueError(f"{self.where}: {name}={value!r} must be ids below vocab_size={vocab_size}")
        return tuple(ids)

    def require(self, name: str, only: Any, default: Any = ...) -> None:
        """ValueError unless the field has the only value that is supported."""
        value = self.values.get(name, default)
        if value != only:
            raise ValueError(f"{self.where}: {name}={value!r} is not supported; only {only!r} is")
