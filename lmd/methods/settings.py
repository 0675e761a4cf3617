"""What the settings of a method may be: of their defaults' types, and within the range that its class gives them."""

import inspect
import json
import math

from basics.console import UserError

_KINDS = (  # type of the default, types that its value may have, in words; the first that fits
    (bool, bool, "true or false"),
    (int, int, "a whole number"),
    (float, (int, float), "a number"),
    (str, str, "a word"),
)


def checked(method, given, where):
    """Settings as a method's class takes them.

    Args:
        method: the class, whose parameters are its settings, and whose `limits` are theirs.
        given: setting -> value, JSON types or tuples of such.
        where: what they were given for, for messages.

    Returns:
        dict: likewise; of a list with one entry the entry will do.

    Raises:
        UserError: it has no such setting, or the value is of another type or out of range.
    """
    known = {key: field.default for key, field in inspect.signature(method).parameters.items()}
    values = {}
    for key, value in given.items():
        if key not in known:
            have = f"the settings of {method.name} are: {', '.join(known)}" if known else f"{method.name} has none"
            raise UserError(f"{where}: there is no setting '{key}'; {have}")
        values[key] = _like(known[key], value, f"{where}: {key}")
        _check_range(known[key], values[key], method.limits.get(key), f"{where}: {key}")
    return values


def text_of(value):
    """A value as it is written in a text of settings."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(text_of, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _like(default, value, where):
    """A value of its default's type; of a list with one entry the entry will do."""
    if isinstance(default, (tuple, list)):
        return [_like(default[0], each, where) for each in (value if isinstance(value, (list, tuple)) else [value])]
    for kind, accepted, what in _KINDS:
        if isinstance(default, kind):
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, accepted):
                raise UserError(f"{where} is {what}, not {text_of(value)}")
            break
    if isinstance(value, (list, tuple)) or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{where} is one number or word, not {text_of(value)}")
    return value


def _check_range(default, value, limits, where):
    """Raises UserError for a list that is empty or repeats itself, and for a number beyond `limits`, see `Method`."""
    if isinstance(value, list):
        if not value:
            raise UserError(f"{where} is empty; give one at least")
        if len({text_of(each).lower() for each in value}) < len(value):
            raise UserError(f"{where} names one twice, {text_of(value)}; leave one out")
        for each in value:
            _check_range(default[0], each, limits, where)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    elif isinstance(default, float):
        above, below = limits or (0, math.inf)
        if not above < value < below:
            end = f" and below {below:g}" if below < math.inf else ""
            raise UserError(f"{where} is {value:g}; it must be above {above:g}{end}")
    elif value < (least := limits or 1):
        raise UserError(f"{where} is {value}; it must be a whole number of {least} at least")
