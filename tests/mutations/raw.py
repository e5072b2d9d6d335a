"""Damages files as bytes and texts, whatever they hold."""

from __future__ import annotations

import json
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", 3, None)
SIZES = (-1, 0, 1, 2, 2**31, 2**62, 2**64, 10**30, 1.5, "3", None, [4])


def damage_bytes(path: Path, rng: random.Random) -> str:
    """Flip bits, cut, repeat or replace bytes."""
    content = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flip", "flip", "cut", "longer", "empty", "zeros", "repeat", "noise"])
    at = rng.randrange(max(1, len(content)))
    if how == "flip":
        for _ in range(rng.choice([1, 1, 2, 8])):
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[at:]
    elif how == "longer":
        content += rng.randbytes(rng.choice([1, 64, 4096]))
    elif how == "empty":
        content.clear()
    elif how == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif how == "repeat":
        content[at:at] = content[at : at + rng.choice([1, 16, 512])]
    else:
        content = bytearray(rng.randbytes(len(content)))
    path.write_bytes(content)
    return f"bytes: {how} at {at}"


def damage_text(path: Path, rng: random.Random) -> str:
    """Edit the text of a JSON file, so that it is something that ``json.dumps`` does not write."""
    text = path.read_text()
    how, change = rng.choice(_TEXTS)
    changed = change(text, rng)
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode("utf-8", "surrogatepass"))
    return f"text: {how}"


def _between(text: str, rng: random.Random, what: str) -> str:
    """Put something in place of a number or in front of a key."""
    places = [number for number, letter in enumerate(text) if letter in "0123456789" and text[number - 1] in " [,:"]
    if not places:
        return what
    at = rng.choice(places)
    end = at
    while end < len(text) and text[end] in "0123456789.e-+":
        end += 1
    return text[:at] + what + text[end:]


def _twice(text: str, rng: random.Random) -> str:
    """Repeat a line with a key, with another value."""
    lines = text.splitlines()
    keys = [number for number, line in enumerate(lines) if '": ' in line]
    if not keys:
        return text + text
    at = rng.choice(keys)
    lines.insert(at, f"{lines[at].partition(': ')[0]}: {rng.choice(['null', '7', '[]', '{}'])},")
    return "\n".join(lines)


_TEXTS: list[tuple[str, Callable[[str, random.Random], str | bytes]]] = [
    ("a key twice", _twice),
    ("NaN", lambda text, rng: _between(text, rng, rng.choice(["NaN", "Infinity", "-Infinity"]))),
    ("huge number", lambda text, rng: _between(text, rng, rng.choice(["1e999", "-1e999", "9" * 400, "9" * 5000]))),
    ("deep lists", lambda text, rng: _between(text, rng, "[" * 50_000 + "]" * 50_000)),
    ("deep dicts", lambda text, rng: _between(text, rng, '{"a":' * 20_000 + "1" + "}" * 20_000)),
    ("surrogate", lambda text, rng: _between(text, rng, rng.choice([r'"\ud800"', '"\ud800"', r'"\u0000"']))),
    ("other letters", lambda text, rng: text.replace(rng.choice("aeio"), rng.choice("\u0430\u0435\u200b\u202e"), 3)),
    ("byte order mark", lambda text, rng: b"\xef\xbb\xbf" + text.encode()),
    ("utf-16", lambda text, rng: text.encode("utf-16")),
    ("not utf-8", lambda text, rng: text.encode().replace(b"e", b"\xff", 1)),
    ("comment", lambda text, rng: f"// {text}"),
    ("two documents", lambda text, rng: text + text),
    ("another type", lambda text, rng: rng.choice(["[]", "{}", "null", "3", '"x"', "[[[]]]", f"[{text}]"])),
]


def damage_header(path: Path, rng: random.Random) -> str:
    """Change one entry of the header of a safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else len(content)
    if length > len(content) - 8:
        return damage_bytes(path, rng)
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    names = sorted(name for name in header if name != "__metadata__")
    how = rng.choice(["dtype", "shape", "offsets", "overlap", "huge", "metadata", "name", "extra", "twice", "entry"])
    if not names:
        how = "metadata"
    name = rng.choice(names) if names else ""
    entry = header.get(name, {})
    text = None
    if how == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif how == "shape":
        entry["shape"] = rng.choice([[rng.choice(SIZES)], [*entry["shape"], rng.choice(SIZES)], entry["shape"][1:], 3])
    elif how == "offsets":
        begin, end = entry["data_offsets"]
        more = [[end, begin], [begin, end + 1], [begin + 1, end], [-1, end], [begin, 2**63], [begin], [0.5, end], None]
        entry["data_offsets"] = rng.choice(more)
    elif how == "overlap":
        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    elif how == "huge":
        entry |= {"shape": [2**40, 2**10], "data_offsets": [entry["data_offsets"][0], 2**52]}
    elif how == "metadata":
        wrong = [{"format": 3}, {"format": "x"}, {}, [], None, {"complex": '["x"]'}, {"complex": "["}, {"a": None}]
        header["__metadata__"] = rng.choice(wrong)
    elif how == "name":
        header[rng.choice(["", "x" * 5000, "../x", "\0", f"{name}.", "__metadata__"])] = header.pop(name)
    elif how == "extra":
        header["extra"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    elif how == "twice":
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    else:
        header[name] = rng.choice([None, [], 3, "x", {}, {"dtype": "F32"}])
    packed = (json.dumps(header) if text is None else text).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + length :])
    return f"header: {how} {name[:60]}"


def damage_array(path: Path, rng: random.Random) -> str:
    """Write one array of an npz anew, of another shape, dtype or with other values, or with a wrong header."""
    import numpy as np

    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    how = rng.choice(["dtype", "shape", "value", "drop", "object", "name", "header", "npy", "bomb"])
    if how == "dtype":
        arrays[name] = array.astype(rng.choice(["float16", "int8", "complex64", "U5", "bool", "float64"]))
    elif how == "shape":
        arrays[name] = rng.choice([array[None], array[:0], array.ravel()[:-1], array[..., None], np.float64(3)])
    elif how == "value":
        arrays[name] = array.astype(float)
        arrays[name].flat[0] = rng.choice([float("nan"), float("inf"), -1e308, -1.0])
    elif how == "drop":
        del arrays[name]
    elif how == "object":
        arrays[name] = np.array([{"a": 1}, None], dtype=object)
    elif how == "name":
        arrays[rng.choice(["x", "arr_0", "mu_s", "pooled"])] = arrays.pop(name)
    elif how == "bomb":
        arrays["arr_0"] = np.zeros((400, 256, 256, 3), np.uint8)  # 79 MB, of which the file takes a thousandth.
    if how == "npy":
        with path.open("wb") as out:
            np.save(out, array)
    elif how == "header":
        shape = rng.choice(["(9999999999,)", "(-1,)", "(1,", "__import__('os')", "(10**9, 10**9)", "(99999, 99999)"])
        head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n"
        with zipfile.ZipFile(path, "w") as archive:
            packed = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode()
            archive.writestr(f"{name}.npy", packed + array.tobytes())
    else:
        np.savez_compressed(path, **arrays)
    return f"array: {how} {name}"


def swap(path: Path, others: Sequence[Path], rng: random.Random) -> str:
    """Put another file in place of a file: of the same folder, or of another kind."""
    other = rng.choice(list(others))
    path.write_bytes(other.read_bytes())
    return f"in its place {other.parent.name}/{other.name}"
