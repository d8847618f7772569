"""Goldens as an attacker would change them: bytes, headers, labels, columns; with and without a digest that fits again."""

import copy
import hashlib
import json
import random

import numpy as np
from safetensors.numpy import load, save

#: What JSON can say in place of any value.
HOSTILE = (
    None, True, -1, 0, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, 1e308, 0.5, -0.0, "", "0", "595", "nan", "\x1b[2J", "\u202e",
    "\ud800", "\n::error::boo", "##[error]boo", "x" * 100_000, [], [1], [[]], [-1, 2**63], {}, {"a": 1}, [None] * 3,
    float("nan"), float("inf"), "../../etc/passwd", "/dev/zero", "processed_logprobs", "float64", [0.5, 0.5],
    {"a": {"b": {"c": {}}}},
)  # fmt: skip
#: What stands in an array in place of any number.
NUMBERS = (0, 1, -1, 2, 127, -128, 255, 2**31 - 1, -(2**31), np.nan, np.inf, -np.inf, 1e30, -9999.0, 0.5, 3.0, -1e-30, 50_000)


def parts_of(data):
    """The header of a golden as JSON, our metadata in it, and its columns."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["logprob_parity"]), load(data)


def sealed(data):
    """The bytes with a digest that fits: what anybody can compute."""
    data = bytearray(data)
    length = int.from_bytes(data[:8], "little")
    key = rb"\"digest\":\""
    place = data.find(key, 8, 8 + length)
    if place < 0 or len(data) < place + len(key) + 64:
        return bytes(data)
    place += len(key)
    data[place : place + 64] = b"0" * 64
    data[place : place + 64] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def built(metadata, columns, header=None):
    """A sealed file of these parts; `header` changes the header's own JSON before it is written."""
    text = json.dumps({**metadata, "digest": "0" * 64}, sort_keys=True, separators=(",", ":"))
    data = save(
        {n: np.ascontiguousarray(c) for n, c in columns.items()}, {"logprob_parity": text.encode("utf-8", "replace").decode()}
    )
    if header is not None:
        length = int.from_bytes(data[:8], "little")
        told = header(json.loads(data[8 : 8 + length]))
        told = told if isinstance(told, bytes) else json.dumps(told, separators=(",", ":")).encode()
        data = len(told).to_bytes(8, "little") + told + data[8 + length :]
    return sealed(data)


def places(value, path=()):
    """The paths of all values in JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:200]:
        yield from places(item, (*path, key))


def changed(value, path, new, *, drop=False):
    """JSON with another value at a path, or without it."""
    if not path:
        return new
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    if drop:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return value


def mutations(data, count, seed=0):
    """`count` mutated files: (what was done, bytes, whether the digest was repaired)."""
    rng = random.Random(seed)
    header, metadata, columns = parts_of(data)
    kinds = (_bytes, _bytes_sealed, _header, _labels, _labels, _labels, _column, _column, _shape, _entry)
    for number in range(count):
        make = kinds[number % len(kinds)]
        try:
            yield make(rng, data, header, metadata, columns)
        except (UnicodeEncodeError, ValueError, TypeError, KeyError, IndexError, OverflowError):
            yield _bytes(rng, data, header, metadata, columns)


def _bytes(rng, data, *_):
    data = bytearray(data)
    kind = rng.choice(("flip", "cut", "insert", "zero", "swap", "grow"))
    for _ in range(rng.choice((1, 1, 1, 8))):
        at = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 4000)), rng.randrange(min(len(data), 16))))
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at:]
            data += b"x" * (not data)
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.choice((1, 4, 1000)))
        elif kind == "zero":
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        elif kind == "swap":
            data[at : at + 8], data[-8:] = data[-8:], data[at : at + 8]
        else:
            data += rng.randbytes(rng.choice((1, 8)))
    return f"bytes: {kind}", bytes(data), False


def _bytes_sealed(rng, data, *parts):
    name, mutated, _ = _bytes(rng, data, *parts)
    return name, sealed(mutated), True


def _header(rng, data, header, metadata, columns):
    where = [path for path in places({n: e for n, e in header.items() if n != "__metadata__"}) if path]
    path, new = rng.choice(where), rng.choice((*HOSTILE, 595.9, "1e400", 2**63, [0, 2**63], [8, 0], "F16", "BF16"))
    drop = rng.random() < 0.1
    return f"header: {path}", built(metadata, columns, lambda told: changed(told, path, new, drop=drop)), True


def _entry(rng, data, header, metadata, columns):
    name = rng.choice(list(columns))
    kind = rng.choice(("overlap", "double", "extra", "rename", "raw", "deep", "space"))

    def change(told):
        if kind == "overlap":
            told[name]["data_offsets"] = told[rng.choice(list(columns))]["data_offsets"]
        elif kind == "double":
            text = json.dumps(told)
            return (text[:-1] + ', "ranks": ' + json.dumps(told["ranks"]) + "}").encode()
        elif kind == "extra":
            told["x" * rng.choice((1, 1000))] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        elif kind == "rename":
            told[rng.choice(("\x1b[31m", "a" * 10_000, "", "trainer_logprobs"))] = told.pop(name)
        elif kind == "raw":
            return json.dumps(told).replace("[", rng.choice(("[1e400,", "[Infinity,", "[0x1,", "[-")), 1).encode()
        elif kind == "deep":
            return b"[" * 100_000
        else:
            return b"   " + json.dumps(told).encode()
        return told

    return f"entry: {kind} {name}", built(metadata, columns, change), True


def _labels(rng, data, header, metadata, columns):
    where = [path for path in places(metadata) if path and path[0] not in ("digest",)]
    path, new = rng.choice(where), rng.choice(HOSTILE)
    drop = rng.random() < 0.1
    return f"labels: {path} = {new!r:.40}", built(changed(metadata, path, new, drop=drop), columns), True


def _column(rng, data, header, metadata, columns):
    name = rng.choice(list(columns))
    column = columns[name].copy()
    flat = column.reshape(-1)
    with np.errstate(all="ignore"):
        for _ in range(rng.choice((1, 3, 1000))):
            if len(flat):
                new = rng.choice(NUMBERS)
                flat[rng.randrange(len(flat))] = (
                    0 if column.dtype.kind != "f" and not np.isfinite(new) else np.array(new).astype(column.dtype)
                )
    return f"column: {name}", built(metadata, {**columns, name: column}), True


def _shape(rng, data, header, metadata, columns):
    name = rng.choice(list(columns))
    column = columns[name]
    kind = rng.choice(("empty", "shorter", "longer", "dtype", "axes", "gone", "twice"))
    made = {
        "empty": lambda: column[:0], "shorter": lambda: column[:-1], "longer": lambda: np.concatenate([column, column[-1:]]),
        "dtype": lambda: column.astype(rng.choice(["int32", "float32", "uint8", "bool", "int64"])),
        "axes": lambda: column[..., None], "twice": lambda: np.concatenate([column, column]), "gone": lambda: None,
    }[kind]()  # fmt: skip
    others = {n: c for n, c in columns.items() if n != name}
    return f"shape: {name} {kind}", built(metadata, others if made is None else {**others, name: made}), True
