"""Reads from the HLO of a compiled program how many bytes its devices exchange."""

import math
import re

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_OPERATIONS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_LINE = re.compile(rf"= (.*?) ({_OPERATIONS})(?:-start)?\(")
_ARRAY = re.compile(rf"({'|'.join(WIDTHS)})\[([\d,]*)\]")


def collective_bytes(hlo: str) -> dict[str, int]:
    """Counts the bytes that a device receives by each kind of collective operation.

    Args:
        hlo: the text of the compiled program of one device.

    Returns:
        Bytes by the name of the operation.

    Example:
        >>> collective_bytes("%r = (f32[2,3]{1,0}, f32[]) all-reduce(%a, %b), channel_id=1")
        {'all-reduce': 28}
    """
    found: dict[str, int] = {}
    for line in hlo.splitlines():
        match = _LINE.search(line)
        if match:
            sizes = (
                WIDTHS[kind] * math.prod(int(n) for n in shape.split(",") if n)
                for kind, shape in _ARRAY.findall(match[1])
            )
            found[match[2]] = found.get(match[2], 0) + sum(sizes)
    return found
