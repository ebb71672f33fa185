"""One file made from others: bytes changed, cut, repeated and spliced; where a file holds JSON, its values too."""

import json
from random import Random
from typing import Any

from tests.fuzz.targets import JSON, JSON_HEADER, JSON_LINES

NUMBERS = (0, 1, -1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(None, True, "", "../../etc/passwd", "\ud800", "\0", "x" * 5000, 0.5, 1e308, float("inf"), float("nan")),
    *([], {}, [[]], [0, -1], {"": None}, 10**400),
    *(json.loads("[" * depth + "]" * depth) for depth in (50, 400, 900)),
    *("I64", "F8_E4M3", "BF16", "user", "text", "prompt"),
)


def mutate(target: str, seeds: list[bytes], random: Random) -> bytes:
    data = random.choice(seeds)
    if target in JSON and random.random() < 0.7:
        data = _json(data, random)
    elif target in JSON_LINES and random.random() < 0.7:
        lines = data.split(b"\n")
        at = random.randrange(len(lines))
        lines[at] = _json(lines[at], random)
        data = b"\n".join(lines)
    elif target in JSON_HEADER and random.random() < 0.7:
        data = _header(data, random)
    else:
        data = _bytes(data, random, seeds)
    return _bytes(data, random, seeds) if random.random() < 0.2 else data


def _bytes(data: bytes, random: Random, seeds: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(changed) + 1)
        length = random.choice((1, 2, 4, 8, 32, 512))
        how = random.randrange(7)
        if how == 0 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << random.randrange(8)
        elif how == 1:
            changed[at : at + length] = random.randbytes(length)
        elif how == 2:
            size = random.choice((4, 8))
            changed[at : at + size] = (random.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
        elif how == 3:
            del changed[at : at + length]
        elif how == 4:
            changed[at:at] = changed[at : at + length] * random.choice((1, 2, 30))
        elif how == 5:
            other = random.choice(seeds)
            changed[at:] = other[random.randrange(len(other) + 1) :]
        else:
            del changed[at:]
    return bytes(changed)


def _header(data: bytes, random: Random) -> bytes:
    """A safetensors file whose JSON header is another, of the length that it says."""
    length = int.from_bytes(data[:8], "little")
    header = _json(data[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _json(data: bytes, random: Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        value = _replace(value, random)
    if random.random() < 0.01:
        return b"[" * 100_000
    return json.dumps(value).encode()


def _replace(value: Any, random: Random) -> Any:
    """`value` with one of its parts replaced, added or taken out."""
    if isinstance(value, str) and value[:1] == "{" and random.random() < 0.8:
        return _json(value.encode(), random).decode()  # JSON within JSON, as safetensors keeps metadata
    if not isinstance(value, dict | list) or not value or random.random() < 0.15:
        return random.choice(VALUES)
    key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = random.random()
    changed = value.copy()
    if how < 0.1:
        del changed[key]
    elif how < 0.2 and isinstance(changed, dict):
        changed[random.choice(("", "x", "text", "messages", str(key) + "x"))] = random.choice(VALUES)
    elif how < 0.2:
        changed.append(random.choice(VALUES))
    else:
        changed[key] = _replace(value[key], random)
    return changed
