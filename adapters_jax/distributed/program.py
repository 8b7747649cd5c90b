"""What a compiler says of a program that it compiled: memory, costs, and exchanged bytes."""

import math
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import jax

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
BITS |= {"f8e4m3fn": 8, "f8e5m2": 8}
# A line of HLO, as the patterns below read it:
#   %all-reduce.3 = f32[8,768]{1,0} all-reduce(%dot.2), channel_id=4, to_apply=%add
# Ends of asynchronous pairs, `...-done`, are left out, since their start has been counted.
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(rf"\b({'|'.join(BITS)})\[([\d,]*)\]")
# %send.1 = (f32[2,8]{1,0}, u32[], token[]) send(%x, %token),
#   frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
_SEND = re.compile(r"= \((\w+\[[\d,]*\]).*\) send\(.*_xla_megascale_transfer_type=")
BETWEEN_SLICES = "between-slices"
_KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__cudnn\$fmha\w*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_EXHAUSTED = re.compile(
    r"RESOURCE_EXHAUSTED.*required.*?\(([\d.]+[KMGT])\).*available.*?\(([\d.]+[KMGT])\)", re.S
)
# ENTRY %main.12 (p0: f32[8]) -> f32[8] {
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)|_computations=\{(.*?)\}")
_INSIDE = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(?:, |$)")
# These only name memory, or run computations whose own operations are counted.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional"}
_AHEAD = {"copy-start", "copy-done", "slice-start", "slice-done"}
_JOINED = 'custom_call_target="ConcatBitcast"'  # slices that were copied ahead
# %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body,
#   backend_config={"known_trip_count":{"n":"12"}}
_LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
_LIMIT = re.compile(r"%?([\w.-]+) = s32\[\]\S* constant\((\d+)\)")
_TEST = re.compile(r"ROOT .* compare\(.*?%?([\w.-]+)\), direction=LT")


@dataclass(frozen=True)
class Program:
    """The program of one device, as its compiler describes it.

    Attributes:
        arguments: bytes of what the program is given.
        outputs: bytes of what it returns.
        aliased: bytes of outputs that take the place of donated arguments.
        temporaries: bytes of its working memory, as JAX's `memory_analysis()` gives them.
        code: bytes of the program itself.
        total: bytes of a device while the program runs. A TPU's outputs and temporaries share room,
            so this is less than the sum of the parts; before JAX 0.12, it is the sum.
        flops: floating-point operations; None if the compiler does not say.
        bytes_accessed: bytes read and written in memory, likewise.
        moved: bytes of what the program's operations are given and return, over all rounds of the
            loops. A TPU's compiler copies some weights into fast memory ahead of their use, whole
            or in slices; `bytes_accessed` counts some of these copies once more, this none.
        seconds: the compiler's own estimate of the time; None if it has none that is positive.
        loops: how often the body of each loop runs. `flops`, `bytes_accessed` and `seconds` count
            every body once.
        collectives: bytes of the results of each kind of collective operation, over all rounds of
            the loops. "between-slices" is what a device sends over the network of the data centre.
        kernels: how many calls there are of each kernel that XLA did not write: `tpu_custom_call`
            is a Pallas kernel of a TPU, `__cudnn$fmha...` cuDNN's attention.
        compile_seconds: the time that the compiler took.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    total: int
    flops: float | None = None
    bytes_accessed: float | None = None
    moved: int = 0
    seconds: float | None = None
    loops: tuple[int, ...] = ()
    collectives: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    compile_seconds: float = field(default=0.0, compare=False)

    @classmethod
    def of(cls, compiled: Any, compile_seconds: float = 0.0) -> "Program":
        """The description of a compiled program (`jax.stages.Compiled`)."""
        memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
        text = compiled.as_text()
        module = Hlo(text)
        seconds = costs.get("optimal_seconds", 0.0)
        arguments, outputs, aliased, temporaries, code = parts = (
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.generated_code_size_in_bytes,
        )
        summed = arguments + outputs - aliased + temporaries + code
        return cls(
            *parts,
            # The field is new in JAX 0.12.
            getattr(memory, "total_allocation_bytes", 0) or summed,
            costs.get("flops"),
            costs.get("bytes accessed"),
            module.moved(),
            seconds if seconds > 0 else None,
            tuple(sorted(module.loops.values())),
            module.collectives(),
            dict(Counter(_KERNEL.findall(text))),
            compile_seconds,
        )


@dataclass(frozen=True)
class TooLarge:
    """A program that its compiler refused, since it does not fit the device; sizes in bytes."""

    total: int
    available: int


def compile_program(lowered: Any) -> Program | TooLarge:
    """Compiles a lowered function (`jax.stages.Lowered`), and describes the program."""
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = _EXHAUSTED.search(str(error))
        if sizes is None:
            raise
        return TooLarge(_size(sizes[1]), _size(sizes[2]))
    return Program.of(compiled, time.monotonic() - began)


def _size(text: str) -> int:
    """The bytes of a size such as `15.75G`."""
    return int(float(text[:-1]) * 1024 ** ("KMGT".index(text[-1]) + 1))


class Hlo:
    """The text of a compiled program, by its computations.

    Args:
        text: what `as_text()` of a compiled program returns.

    Attributes:
        lines: the lines of each computation.
        loops: by the body of a loop, how often it runs: 1 where the text does not say.
    """

    def __init__(self, text: str):
        self.lines: dict[str, list[str]] = {"": []}
        self.entry = name = ""
        for line in text.splitlines():
            if head := _HEAD.match(line):
                name = head[2]
                self.entry = name if head[1] else self.entry
                self.lines[name] = []
            self.lines[name].append(line)
        self.loops = {
            match[2]: self._trips(line, match[1])
            for lines in self.lines.values()
            for line in lines
            if (match := _LOOP.search(line))
        }

    def _trips(self, line: str, condition: str) -> int:
        """The rounds of a loop: stated, or the limit that a counter from 0 on is compared with."""
        if stated := _TRIPS.search(line):
            return int(stated[1])
        body = self.lines.get(condition, [])
        # A scan counts from 0 and goes on while its counter is below a constant.
        limits = {found[1]: int(found[2]) for x in body if (found := _LIMIT.search(x))}
        tests = [found[1] for x in body if (found := _TEST.search(x))]
        return limits.get(tests[0], 1) if tests else 1

    def times(self) -> dict[str, int]:
        """How often each computation runs, by the first way that reaches it."""
        found, left = {self.entry: 1}, [self.entry]
        while left:
            name = left.pop()
            for line in self.lines.get(name, []):
                for one, several in _CALLED.findall(line):
                    for called in [one] if one else re.findall(r"[\w.-]+", several):
                        if called not in found:
                            found[called] = found[name] * self.loops.get(called, 1)
                            left.append(called)
        return found

    def moved(self) -> int:
        """The bytes of operands and results, without copies ahead of use and what joins them.

        Example:
            >>> text = "ENTRY main () {\\n  %a = f32[2,3] parameter(0)\\n"
            >>> Hlo(text + "  ROOT %b = bf16[2,3] convert(%a)\\n}").moved()
            36
        """
        # A fusion's operations pass values in registers, so only the fusion itself moves bytes.
        inside = {
            name for lines in self.lines.values() for x in lines for name in _INSIDE.findall(x)
        }
        found = 0
        for name, times in self.times().items():
            if name in inside:
                continue
            results: dict[str, int] = {}
            for line in self.lines[name]:
                if match := _OPERATION.match(line):
                    result, shape, kind, operands = match.groups()
                    results[result] = _bytes(shape, "", False)
                    if kind not in _FREE | _AHEAD and _JOINED not in line:
                        given = re.findall(r"%?([\w.-]+)", operands)
                        found += times * sum(results.get(x, 0) for x in [result, *given])
        return found

    def collectives(self) -> dict[str, int]:
        """The bytes of the results of each kind of collective operation.

        TPUs split an operation into parts, which share the number of its channel.

        Example:
            >>> text = "ENTRY main () {\\n%r = (f32[2,3]{1,0}, f32[]) all-reduce(%a, %b)\\n}"
            >>> Hlo(text).collectives()
            {'all-reduce': 28}
        """
        found: dict[str, int] = {}
        seen = set()
        times = self.times()
        for name, lines in self.lines.items():
            for line in lines:
                if sent := _SEND.search(line):
                    size = _bytes(sent[1], "", False) * times.get(name, 1)
                    found[BETWEEN_SLICES] = found.get(BETWEEN_SLICES, 0) + size
                match = _COLLECTIVE.search(line)
                if not match:
                    continue
                channel = _CHANNEL.search(line)
                key = (match[2], channel[1]) if channel else object()
                # Else an exchange in four parts would count four times.
                if key not in seen:
                    seen.add(key)
                    size = _bytes(match[1], match[2], bool(match[3])) * times.get(name, 1)
                    found[match[2]] = found.get(match[2], 0) + size
        return found


def _bytes(shape: str, kind: str, starts: bool) -> int:
    """The bytes of an operation's result; one that only starts also lists what it was given."""
    sizes = [
        BITS[dtype] * math.prod(int(n) for n in dims.split(",") if n) // 8
        for dtype, dims in _ARRAY.findall(shape)
        if dims or not starts
    ]
    with_inputs = starts and kind != "all-reduce" and len(sizes) > 1
    return sum(sizes[len(sizes) // 2 :] if with_inputs else sizes)
