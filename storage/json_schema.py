"""What a JSON file of this program may hold: fields, types, sizes and depth, checked before it is used."""

import json
import math

from storage.arrays import shortened


def is_count(value):
    return type(value) is int and 0 <= value <= _LARGEST


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


_LARGEST = 2**53  # whole numbers up to here are the same in every reader of JSON
_DEEPEST = 32  # tables and lists in each other
COUNT = ("a whole number, 0 or more", is_count)
POSITIVE = ("a whole number, 1 or more", lambda value: is_count(value) and value > 0)
SHARE = ("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
FLAG = ("true or false", lambda value: type(value) is bool)
TEXT = ("text", lambda value: isinstance(value, str))
TABLE = ("a table", lambda value: isinstance(value, dict))


def list_of(kind, length=None):
    what, fits = kind
    return (
        f"a list, each {what}",
        lambda value: isinstance(value, list) and (length is None or len(value) == length) and all(map(fits, value)),
    )


def table_of(kind):
    what, fits = kind
    return f"a table, each {what}", lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def or_null(kind):
    what, fits = kind
    return f"{what}, or null", lambda value: value is None or fits(value)


def parse_json(text, fields, required):
    """JSON text that must be a table with these fields.

    Raises:
        ValueError: it is no such table; the message says where.
        RecursionError: it is nested too deeply to be read at all.
    """
    value = json.loads(text)
    level = [value]
    for _ in range(_DEEPEST):
        level = [part for whole in level if isinstance(whole, (dict, list)) for part in _parts(whole)]
    if level:
        raise RecursionError
    check_fields(value, fields, required)
    return value


def _parts(value):
    return value.values() if isinstance(value, dict) else value


def check_fields(table, fields, required=(), where=""):
    if not isinstance(table, dict):
        raise ValueError(f"{shortened(table)} is no table")
    for name, (what, fits) in fields.items():
        if name in table and not fits(table[name]):
            raise ValueError(f"{where}{name} is {shortened(table[name])}, not {what}")
    if missing := [name for name in required if name not in table]:
        raise ValueError(f"{where}{missing[0]} is missing")
