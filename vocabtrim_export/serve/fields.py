"""`Fields`: a request's JSON object, each field of which is read once and checked."""

import json
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from vocabtrim_export.serve.errors import ApiError

LARGEST = 1 << 63  # bounds numbers that have no bound of their own


class Fields:
    """The fields of a request. A field that no code has read by the end is an error; none is ignored silently."""

    def __init__(self, body: bytes) -> None:
        """Parse a body.

        Raises:
            ApiError: It is not a JSON object.
        """
        try:
            values = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
        except UnicodeDecodeError as error:
            raise ApiError(400, f"the request's body is not UTF-8 (byte {error.start})") from error
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the request's body is not JSON: {' '.join(str(error).split())[:100]}") from error
        if not isinstance(values, dict):
            raise ApiError(400, "the request's body is no JSON object")
        self._values = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """Returns a field's value, `default` where it is absent or null."""
        return self._values.pop(name, default)

    def flag(self, name: str) -> bool:
        """Returns a truth value, false by default.

        Raises:
            ApiError: The field holds something else.
        """
        value = self.take(name, False)
        return value if isinstance(value, bool) else _refuse(name, value, "true or false")

    def whole(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """Returns a whole number.

        Args:
            name: The field.
            default: The value where the field is absent or null.
            least: The least number.
            most: The greatest number.

        Raises:
            ApiError: The field holds something else.
        """
        value = self.take(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            _refuse(name, value, f"a whole number from {least} {f'to {most}' if most < LARGEST else 'up'}")
        return value

    def number(self, name: str, default: float | None) -> float | None:
        """Returns a number, `default` where the field is absent or null.

        Raises:
            ApiError: The field holds something else.
        """
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            _refuse(name, value, "a number")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Returns an object, empty by default.

        Raises:
            ApiError: The field holds something else.
        """
        value = self.take(name, {})
        return value if isinstance(value, dict) else _refuse(name, value, "an object")

    def ignore(self, names: Collection[str]) -> None:
        """Accept and ignore fields that change no output."""
        for name in names:
            self._values.pop(name, None)

    def refuse(self, name: str, harmless: Collection[Any], why: str) -> None:
        """Refuse a field that this server lacks, unless its value asks for nothing.

        Args:
            name: The field.
            harmless: Values with which the field changes nothing.
            why: The missing part, and the way to get it.

        Raises:
            ApiError: The field has another value.
        """
        value = self.take(name)
        if value is not None and value not in harmless:
            raise ApiError(400, f"{name} is not supported here: {why}", name, "unsupported_parameter")

    def finish(self) -> None:
        """Check that every field was read.

        Raises:
            ApiError: A field was not read; it might have changed the answer.
        """
        if self._values:
            name = next(iter(self._values))[:100]
            raise ApiError(400, f"unrecognized request argument: {name!r}; leave it out", name, "unknown_parameter")


def _refuse(name: str, value: Any, wanted: str) -> NoReturn:
    shown = json.dumps(value)[:60]
    raise ApiError(400, f"{name} is {shown}: give {wanted}", name, "invalid_value")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
