"""`response_format`: the form that a request asks for its answer."""

from collections.abc import Mapping
from typing import Any

from engines.errors import VocabtrimError
from runtime import SpeculativeDecoder
from vocabtrim_export.serve.errors import ApiError
from vocabtrim_export.serve.fields import Fields

_NAME = "response_format"
_OBJECT = {"type": "object"}
_PARTS = {"name", "description", "schema", "strict"}  # every schema is followed strictly; the other two are notes


def read_response_format(fields: Fields, decoder: SpeculativeDecoder) -> Mapping[str, Any] | None:
    """Returns the JSON schema that the answer must have, or None for text.

    Args:
        fields: The request's fields.
        decoder: Compiles the schema once, so that one that it cannot apply is refused before the request waits.

    Raises:
        ApiError: The field is malformed, or its schema cannot be applied.
    """
    value = fields.mapping(_NAME)
    kind = value.get("type", "text")
    if kind not in ("text", "json_object", "json_schema"):
        raise _error("its type must be 'text', 'json_object' or 'json_schema'")
    if unknown := value.keys() - {"type"} - ({"json_schema"} if kind == "json_schema" else set()):
        raise _error(f"{min(unknown)[:100]!r} does not belong to the type {kind!r}: leave it out")
    if kind == "text":
        return None
    schema = _OBJECT if kind == "json_object" else _schema(value.get("json_schema"))
    try:
        decoder.check_json_schema(schema)
    except VocabtrimError as error:
        raise _error(str(error)) from error
    return schema


def _schema(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("schema"), dict):
        raise _error("json_schema must be an object with a 'schema' that is an object")
    if unknown := value.keys() - _PARTS:
        raise _error(f"{min(unknown)[:100]!r} does not belong to json_schema: leave it out")
    schema: dict[str, Any] = value["schema"]
    return schema


def _error(why: str) -> ApiError:
    return ApiError(400, f"{_NAME}: {why}", _NAME, "invalid_value")
