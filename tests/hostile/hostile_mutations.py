"""Damage done to valid files: random values at random places, bytes flipped, cut, inserted.

Every function takes its randomness from a ``random.Random``: hypothesis gives one that it can shrink,
`benchmarks/fuzz.py` one with a seed.
"""

from __future__ import annotations

import json
import string
import struct
from collections.abc import Callable
from random import Random
from typing import Any

MARKUP = "<script>window.pwned=1</script>\"'><img src=x onerror=window.pwned=1>"
CONTROLS = "\x1b]0;pwned\x07\x1b[31m\x9b2J\u202eevil"
NASTY = (
    "",
    " ",
    "\n",
    "../../../etc/passwd",
    "/etc/passwd",
    "os:system",
    "canary_module:run",
    "npz:/dev/zero",
    "separable:n=1000000000000",
    "mlp:1000000000,1000000000",
    "art:canary_module",
    "fgsm:eps=1e999",
    "$\\frac{1}{",
    "{eps}",
    "[red]x[/red]",
    "[link=file:///etc/passwd]x[/link]",
    "=cmd|' /C calc'!A0",
    "javascript:alert(1)",
    "\ud800",
    "\ufeff",
    "٣",
    "NaN",
    "x" * 20_000,
    CONTROLS,
    MARKUP,
)
NUMBERS = (0, -1, 1, 2, 1e308, -1e308, 5e-324, 2**31, 2**63, -(2**63), 10**18, 10**19, 0.5, -0.0)
STRANGE = (
    "1" * 5000,  # more digits than Python makes an integer of
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "[" * 100_000,
    "[" * 900 + "]" * 900,
    '{"a":' * 900 + "1" + "}" * 900,
    '{"step": 1, "step": "two", "kind": []}',
    '"\\ud800"',
    '"\\u001b]0;pwned\\u0007"',
)
"""JSON, or nearly, that ``json.dumps`` does not write."""


def any_json(random: Random, depth: int = 0) -> Any:
    """A JSON value of any type."""
    kind = random.randrange(8 if depth < 3 else 6)
    if kind == 0:
        return None
    if kind == 1:
        return random.random() < 0.5
    if kind == 2:
        return random.choice(NUMBERS)
    if kind == 3:
        return random.uniform(-10.0, 10.0)
    if kind == 4:
        return random.choice(NASTY)
    if kind == 5:
        return any_text(random)
    entries = [any_json(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 6:
        return entries
    return {random.choice(("a", "step", "name", "", "__class__")): entry for entry in entries}


def any_text(random: Random) -> str:
    letters = string.printable + "\x00\x1bγ∞\U0001f600"
    return "".join(random.choice(letters) for _ in range(random.randrange(20)))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in ``value``: its container, and the key or the index there."""
    found, waiting = [], [value]
    while waiting:
        inside = waiting.pop()
        keys: Any = inside.keys() if isinstance(inside, dict) else range(len(inside))
        for key in keys:
            found.append((inside, key))
            if isinstance(inside[key], dict | list) and inside[key]:
                waiting.append(inside[key])
    return found


def mutated_json(random: Random, content: str) -> str:
    """``content``, a JSON text, with one to three of its nodes replaced, removed or made strange."""
    value = json.loads(content)
    if random.randrange(12) == 0:
        return _spoilt(random, content)
    strange: dict[str, str] = {}
    for _ in range(random.randrange(1, 4)):
        found = places(value)
        if not found:
            break
        inside, key = random.choice(found)
        how = random.randrange(8)
        if how == 0:
            del inside[key]
        elif how == 1:
            mark = f"@{len(strange)}@"
            strange[mark] = random.choice(STRANGE)
            inside[key] = mark
        elif how == 2 and isinstance(inside[key], str):
            inside[key] = mutated_text(random, inside[key])
        elif how == 3 and isinstance(inside, dict):
            inside[random.choice(NASTY)] = inside.pop(key)
        elif how == 4 and isinstance(inside[key], list):
            inside[key] = inside[key] * 2 if random.random() < 0.5 else inside[key][:-1]
        else:
            inside[key] = any_json(random)
    text = json.dumps(value, ensure_ascii=True)
    for mark, written in strange.items():
        text = text.replace(f'"{mark}"', written)
    return text


def _spoilt(random: Random, content: str) -> str:
    how = random.randrange(5)
    if how == 0:
        return random.choice(STRANGE)
    if how == 1:
        return "\ufeff" + content
    if how == 2:
        return content[: random.randrange(len(content) + 1)]
    if how == 3:
        return json.dumps(any_json(random))
    place = random.randrange(len(content) + 1)
    return content[:place] + random.choice(STRANGE) + content[place:]


def mutated_text(random: Random, text: str) -> str:
    """A specification with characters exchanged, left out or put in."""
    letters = list(text)
    for _ in range(random.randrange(1, 4)):
        place = random.randrange(len(letters) + 1)
        how = random.randrange(4)
        if how == 0 and place < len(letters):
            del letters[place]
        elif how == 1:
            letters.insert(place, random.choice(":,=/.-+ eE_0\u0663\x00inf"))
        elif how == 2 and place < len(letters):
            letters[place] = random.choice(":,=/;\nnan|∞")
        else:
            other = random.choice(NASTY)
            letters[place:place] = other[:40]
    return "".join(letters)


def mutated_lines(random: Random, content: str) -> str:
    """JSON lines with one of them damaged."""
    lines = content.splitlines()
    place = random.randrange(len(lines))
    how = random.randrange(6)
    if how == 0:
        lines[place] = random.choice(STRANGE)
    elif how == 1:
        lines.insert(place, "")
    else:
        lines[place] = mutated_json(random, lines[place])
    return "\n".join(lines) + ("" if random.randrange(8) == 0 else "\n")


def mutated_bytes(random: Random, content: bytes) -> bytes:
    """Bytes flipped, cut off, left out, put in, or overwritten by large numbers."""
    data = bytearray(content)
    for _ in range(random.randrange(1, 4)):
        place = random.randrange(len(data) + 1)
        how = random.randrange(6)
        if how == 0 and place < len(data):
            data[place] ^= 1 << random.randrange(8)
        elif how == 1:
            del data[place:]
        elif how == 2:
            del data[place : place + random.randrange(1, 9)]
        elif how == 3:
            data[place:place] = bytes(random.randrange(256) for _ in range(random.randrange(1, 9)))
        elif how == 4:
            data[place : place + 4] = struct.pack("<I", random.choice((0, 1, 2**31, 2**32 - 1)))
        else:
            data[place : place + 8] = struct.pack("<Q", random.choice((0, 2**40, 2**63, 2**64 - 1)))
    return bytes(data)


def mutated_tensors(random: Random, content: bytes) -> bytes:
    """A safetensors file with another header: names, shapes, dtypes and offsets."""
    if random.randrange(3) == 0:
        return mutated_bytes(random, content)
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    entry = header[random.choice(names)]
    how = random.randrange(7)
    if how == 0:
        entry["shape"] = random.choice(
            ([], [10**9, 10**9], [-1], [0], [1] * 70, entry["shape"][::-1])
        )
    elif how == 1:
        entry["dtype"] = random.choice(("F64", "F32", "I64", "U8", "BOOL", "C64", "F8_E4M3", "X"))
    elif how == 2:
        entry["data_offsets"] = random.choice(([0, 0], [0, 2**63], [5, 1], [0, 10**12]))
    elif how == 3:
        name = random.choice(names)
        header[random.choice(NASTY)] = header.pop(name)
    elif how == 4:
        del header[random.choice(names)]
    elif how == 5:
        header["__metadata__"] = {"a": random.choice(NASTY)}
    else:
        text = mutated_json(random, json.dumps(header)).encode("utf-8", "replace")
        return struct.pack("<Q", len(text)) + text + content[8 + size :]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def mutated_toml(random: Random, content: str) -> str:
    """A TOML file with a line exchanged, doubled or made strange."""
    lines = content.splitlines()
    for _ in range(random.randrange(1, 4)):
        place = random.randrange(len(lines))
        key, equals, _ = lines[place].partition(" = ")
        how = random.randrange(7)
        if how == 0:
            del lines[place]
        elif how == 1:
            lines.insert(place, lines[place])
        elif how == 2 and equals:
            strange = ("[]", "{}", "nan", "inf", "1979-05-27", "true", "1" * 5000, '"\\u001b]0;p"')
            lines[place] = (
                key + equals + random.choice((*strange, "[" * 5000, "[[1]]", "[{}]", '""'))
            )
        elif how == 3 and equals:
            lines[place] = key + equals + json.dumps(random.choice(NASTY))
        elif how == 4 and equals:
            lines[place] = random.choice(("a-b", "sweep", '""', "data.x")) + " = 1"
        elif how == 5:
            lines[place] = random.choice(
                ("[sweep]", "[[trials]]", "[x]", "= 1", "[grid.eps]", "\x00")
            )
        else:
            lines[place] = mutated_text(random, lines[place])
        if not lines:
            break
    return "\n".join(lines)


Mutation = Callable[[Random, bytes], bytes]


def of_text(change: Callable[[Random, str], str]) -> Mutation:
    """A mutation of text as one of bytes; a lone surrogate stays one."""

    def mutate(random: Random, content: bytes) -> bytes:
        return change(random, content.decode()).encode("utf-8", "surrogatepass")

    return mutate
