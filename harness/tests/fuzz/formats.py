"""The formats of the files that are altered: read into plain values, written from them, compared."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tomllib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tomli_w


class _Unreadable:
    """What a file says that cannot be read; two such files never say the same."""

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return id(self)


def unreadable() -> object:
    """Return what stands for the content of a file that cannot be read."""
    return _Unreadable()


_DEEP = "a deep value of "


def deep(depth: int) -> str:
    """Return a text that the formats write as a list in a list in a list, so many times."""
    return f"{_DEEP}{depth}"


def _with_deep(text: str) -> str:
    start = text.find(f'"{_DEEP}')
    if start < 0:
        return text
    end = text.index('"', start + 1)
    depth = int(text[start + 1 + len(_DEEP) : end])
    return text[:start] + "[" * depth + "]" * depth + text[end + 1 :]


class Format(Protocol):
    """How a file of one format becomes a value of dictionaries, lists and plain ones, and back."""

    def load(self, data: bytes) -> Any: ...
    def dump(self, value: Any) -> bytes: ...
    def meaning(self, data: bytes) -> Any:
        """Return what the file says, comparable; what cannot be read equals nothing."""
        ...


@dataclass(frozen=True)
class JsonFormat:
    """One JSON value."""

    def load(self, data: bytes) -> Any:
        return json.loads(data.decode("utf-8-sig"))

    def dump(self, value: Any) -> bytes:
        return (_with_deep(json.dumps(value, indent=1, ensure_ascii=False)) + "\n").encode(
            errors="surrogatepass"
        )

    def meaning(self, data: bytes) -> Any:
        return _canonical(self, data)


@dataclass(frozen=True)
class LinesFormat:
    """One JSON value a line; lines end at newlines only."""

    def load(self, data: bytes) -> Any:
        return [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]

    def dump(self, value: Any) -> bytes:
        return "".join(_with_deep(json.dumps(line)) + "\n" for line in value).encode()

    def meaning(self, data: bytes) -> Any:
        if not data.endswith(b"\n"):
            return unreadable()
        return _canonical(self, data)


@dataclass(frozen=True)
class TomlFormat:
    """A TOML file."""

    def load(self, data: bytes) -> Any:
        return tomllib.loads(data.decode("utf-8-sig"))

    def dump(self, value: Any) -> bytes:
        return _with_deep(tomli_w.dumps(_without_null(value))).encode(errors="surrogatepass")

    def meaning(self, data: bytes) -> Any:
        return _canonical(self, data)


@dataclass(frozen=True)
class TextFormat:
    """Lines of text; what stands in for a number or a key is code of a template."""

    def load(self, data: bytes) -> Any:
        return data.decode("utf-8-sig").split("\n")

    def dump(self, value: Any) -> bytes:
        lines = value if isinstance(value, list) else [value]
        return "\n".join(self._line(line) for line in lines).encode(errors="surrogatepass")

    def meaning(self, data: bytes) -> Any:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return unreadable()

    def _line(self, line: Any) -> str:
        if isinstance(line, str):
            if line.startswith(_DEEP):
                return "{% if true %}" * (int(line.removeprefix(_DEEP)) // 100)
            return line
        if isinstance(line, dict):  # keys that are not there
            return "".join("{{ " + str(name or "nothing").replace("\u202e", "x") + ".key }}" for name in line)
        if isinstance(line, int) and abs(line) > 10**6:
            return "{% for i in range(" + str(abs(line)) + ") %}{{ i }}{% endfor %}"
        return "{{ " + str(line) + " | round | int }}"


@dataclass(frozen=True)
class SafetensorsFormat:
    """A safetensors file: its header, metadata that are JSON taken apart, and the bytes of the tensors."""

    def load(self, data: bytes) -> Any:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        inner = header.get("__metadata__", {})
        for name, text in inner.items():
            if text.startswith("{"):
                inner[name] = json.loads(text)
        return {
            "header": header,
            "data": list(struct.unpack(f"<{(len(data) - 8 - length) // 4}f", data[8 + length :])),
        }

    def dump(self, value: Any) -> bytes:
        header = dict(value.get("header", {})) if isinstance(value.get("header"), dict) else {}
        inner = header.get("__metadata__")
        if isinstance(inner, dict):
            texts = {n: t if isinstance(t, str) else _with_deep(json.dumps(t)) for n, t in inner.items()}
            header["__metadata__"] = texts
        text = _with_deep(json.dumps(header)).encode()
        text += b" " * (-len(text) % 8)
        numbers = value.get("data", [])
        floats = [_as_float(one) for one in numbers] if isinstance(numbers, list) else []
        return struct.pack("<Q", len(text)) + text + struct.pack(f"<{len(floats)}f", *floats)

    def meaning(self, data: bytes) -> Any:
        try:
            header = self.load(data)["header"]
        except (ValueError, struct.error, RecursionError, TypeError, KeyError, AttributeError):
            return unreadable()
        return json.dumps(header, sort_keys=True), self.tensors(data)

    def tensors(self, data: bytes) -> Any:
        """Return name, dtype, shape and hash of every tensor."""
        try:
            (length,) = struct.unpack("<Q", data[:8])
            header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
            return {
                name: (one["dtype"], one["shape"], _sha256(body[slice(*one["data_offsets"])]))
                for name, one in header.items()
                if name != "__metadata__"
            }
        except (ValueError, struct.error, RecursionError, TypeError, KeyError, AttributeError):
            return unreadable()


@dataclass(frozen=True)
class NpzFormat:
    """A trace: its header in JSON and its arrays as lists."""

    def load(self, data: bytes) -> Any:
        with np.load(io.BytesIO(data)) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        return {"header": header, "arrays": {name: array.tolist() for name, array in arrays.items()}}

    def dump(self, value: Any) -> bytes:
        buffer = io.BytesIO()
        arrays = value.get("arrays", {})
        made = {name: _array(rows) for name, rows in arrays.items()} if isinstance(arrays, dict) else {}
        if "header" in value:
            made["header"] = np.frombuffer(_with_deep(json.dumps(value["header"])).encode(), dtype=np.uint8)
        np.savez_compressed(buffer, **made)  # type: ignore[arg-type]
        return buffer.getvalue()

    def meaning(self, data: bytes) -> Any:
        try:
            return json.dumps(self.load(data), sort_keys=True)
        except Exception:  # whatever a broken archive raises: it cannot be read
            return unreadable()


def _canonical(form: Format, data: bytes) -> Any:
    try:
        return json.dumps(form.load(data), sort_keys=True, default=str)
    except (ValueError, RecursionError):
        return unreadable()


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_null(one) for key, one in value.items() if one is not None}
    return [_without_null(one) for one in value if one is not None] if isinstance(value, list) else value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _as_float(value: Any) -> float:
    try:
        return float(np.float32(value))
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _array(rows: Any) -> np.ndarray[Any, Any]:
    """Return rows as an array of the type that they have; what no array holds becomes text."""
    try:
        array = np.array(rows)
    except (ValueError, OverflowError):
        return np.array([str(rows)])
    return array if array.dtype != object else np.array([str(one) for one in rows])
