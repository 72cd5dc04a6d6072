"""Ten ways to alter a file: of its bytes, and of what they say in the file's own format."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

from harness.tests.fuzz.formats import Format, deep

MUTATIONS = (
    "truncate",
    "flip",
    "delete",
    "reorder",
    "duplicate",
    "nan",
    "huge",
    "version",
    "extra",
    "encoding",
)
_NOT_NUMBERS = (float("nan"), float("inf"), float("-inf"))
_VERSIONS: tuple[Any, ...] = (0, 2, 99, -1, 1.5, "1", "two", True, [1], 10**30)
_ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "cp037", "utf-8-sig", "latin-1")
_BAD_BYTES = (
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x00",
    b"\xc3",
    "é".encode("latin-1"),
    b"\x80",
    b"\xf5\x80\x80\x80",
)

LONG_LIST = 40

Slot = tuple[Any, Any]  # a container and the key or index of one of its values


def mutated(mutation: str, data: bytes, form: Format, rng: random.Random) -> bytes:
    """Return a file's bytes altered in one of the ways, as the numbers of `rng` have it."""
    of_bytes: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "truncate": _truncate,
        "flip": _flip,
        "encoding": _encode,
    }
    if mutation in of_bytes:
        return of_bytes[mutation](data, rng)
    value = copy.deepcopy(form.load(data))
    return form.dump(_OF_VALUES[mutation](value, rng))


def _truncate(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return b""
    if rng.random() < 0.3 and (ends := [place + 1 for place, byte in enumerate(data[:-1]) if byte == 10]):
        return data[: rng.choice(ends)]  # whole lines
    return data[: rng.randrange(len(data))]


def _flip(data: bytes, rng: random.Random) -> bytes:
    altered = bytearray(data)
    # half of them at the front, where formats keep what they are
    reach = len(altered) if rng.random() < 0.5 else min(len(altered), 400)
    for _ in range(rng.choice((1, 1, 2, 8))):
        altered[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(altered)


def _encode(data: bytes, rng: random.Random) -> bytes:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = None
    if text is None or rng.random() < 0.4:
        place = rng.randrange(len(data) + 1)
        return data[:place] + rng.choice(_BAD_BYTES) + data[place:]
    return text.encode(rng.choice(_ENCODINGS), errors="replace")


def slots(value: Any) -> Iterator[Slot]:
    """Return the places of a value that hold another: of long lists three, so that they do not drown the
    rest.
    """
    keys: Any = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        last = len(value) - 1
        keys = range(len(value)) if len(value) <= LONG_LIST else (0, last // 2, last)
    for key in keys:
        yield value, key
        yield from slots(value[key])


def _delete(value: Any, rng: random.Random) -> Any:
    container, key = rng.choice(list(slots(value)))
    del container[key]
    return value


def _reorder(value: Any, rng: random.Random) -> Any:
    lists = [one for one in _within(value, list) if len(one) > 1]
    if lists:
        rng.shuffle(rng.choice(lists))
    return value


def _duplicate(value: Any, rng: random.Random) -> Any:
    lists = [one for one in _within(value, list) if one]
    if lists:
        chosen = rng.choice([lists[0], rng.choice(lists)])  # the outermost as often as all others
        place = rng.randrange(len(chosen))
        chosen.insert(place, copy.deepcopy(chosen[place]))
        return value
    container, key = rng.choice(list(slots(value)))
    container[key] = [copy.deepcopy(container[key])] * 2
    return value


def _nan(value: Any, rng: random.Random) -> Any:
    _replace(value, rng, lambda old: rng.choice(_NOT_NUMBERS))
    return value


def _huge(value: Any, rng: random.Random) -> Any:
    def larger(old: Any) -> Any:
        choices: list[Any] = [10**30, -(10**18), 2**63, 10**9, 1e308]
        if isinstance(old, str):
            choices = ["x" * 10**6, "../" * 3000, 10**30]
        elif isinstance(old, list) and old:
            choices = [old * (20_000 // len(old) + 1)]
        return rng.choice([*choices, deep(rng.choice((600, 100_000)))])

    any_kind = rng.random() < 0.3
    _replace(value, rng, larger, any_kind=any_kind)
    return value


def _version(value: Any, rng: random.Random) -> Any:
    found = [(holder, key) for holder, key in slots(value) if key == "schema_version"]
    if found:
        holder, key = rng.choice(found)
        holder[key] = rng.choice([version for version in _VERSIONS if version is not holder[key]])
    else:
        _holder(value, rng)["schema_version"] = rng.choice(_VERSIONS)
    return value


def _extra(value: Any, rng: random.Random) -> Any:
    holder = _holder(value, rng)
    names = ["unknown", "__class__", "", "\u202e", "a.b", *(name.upper() for name in list(holder)[:3])]
    holder[rng.choice(names)] = rng.choice([1, "text", None, [1], {"a": 1}])
    return value


def _holder(value: Any, rng: random.Random) -> dict[str, Any]:
    """Return a dictionary of the value; one that holds none, such as lines of text, gets one somewhere."""
    held = _within(value, dict)
    if held:
        chosen: dict[str, Any] = rng.choice(held)
        return chosen
    new: dict[str, Any] = {}
    (value if isinstance(value, list) else []).insert(rng.randrange(len(value) + 1), new)
    return new


def _within(value: Any, kind: type) -> list[Any]:
    own = [value] if isinstance(value, kind) else []
    return [*own, *(holder[key] for holder, key in slots(value) if isinstance(holder[key], kind))]


def _replace(value: Any, rng: random.Random, change: Callable[[Any], Any], *, any_kind: bool = False) -> None:
    places = list(slots(value))
    numbers = [
        (holder, key)
        for holder, key in places
        if isinstance(holder[key], int | float) and not isinstance(holder[key], bool)
    ]
    holder, key = rng.choice(places if any_kind or not numbers else numbers)
    holder[key] = change(holder[key])


_OF_VALUES: dict[str, Callable[[Any, random.Random], Any]] = {
    "delete": _delete,
    "reorder": _reorder,
    "duplicate": _duplicate,
    "nan": _nan,
    "huge": _huge,
    "version": _version,
    "extra": _extra,
}
