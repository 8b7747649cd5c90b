"""What an audit found, as an object that prints as a table."""

import math
import re
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SiteCount:
    """One adapter, or one unfrozen parameter, in one module (or in one stack of modules).

    Attributes:
        path: of the module, or of the unfrozen parameter.
        method: name of the method's class.
        shapes: its arrays' shapes by name, as they are in the tree.
        formula: the closed form with numbers put in.
        expected: what the closed form gives.
        actual: what the arrays hold.
    """

    path: str
    method: str
    shapes: tuple[tuple[str, Shape], ...]
    formula: str
    expected: int
    actual: int


@dataclass(frozen=True)
class Audit:
    """What a recipe adds to a model and trains in it. `repr` is a plain table; rich prints it too.

    Attributes:
        sites: one entry for every adapter and every unfrozen parameter.
        adapter_parameters: parameters that the recipe's methods added.
        trainable_parameters: these and the unfrozen ones.
        frozen_parameters: the rest.
        trainable_bytes: bytes of what is trained, as a `TrainState` keeps it: half precision in
            float32.
        gradient_bytes: bytes of its gradients.
        optimizer_bytes: bytes of the optimiser's state.
        frozen_bytes: bytes of the rest.
        unmatched: patterns of the recipe that nothing in the tree answers to.
        quantized_parameters: those of the frozen ones that are quantised.
    """

    sites: tuple[SiteCount, ...]
    adapter_parameters: int
    trainable_parameters: int
    frozen_parameters: int
    trainable_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    frozen_bytes: int
    unmatched: tuple[str, ...]
    quantized_parameters: int = 0

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of the base, which the adapters are not part of."""
        base = self.frozen_parameters + self.trainable_parameters - self.adapter_parameters
        return 100 * self.trainable_parameters / max(base, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON would have it."""
        fields = {k: v for k, v in vars(self).items() if k not in ("sites", "unmatched")}
        sites = [{**vars(s), "shapes": {k: list(v) for k, v in s.shapes}} for s in self.sites]
        return {
            **fields,
            "percent": self.percent,
            "sites": sites,
            "unmatched": list(self.unmatched),
        }

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """The table's rows, layers of one shape together: path, method, shapes, formula, n, sum."""
        groups: dict[tuple[Any, ...], list[SiteCount]] = {}
        for site in self.sites:
            shapes = ", ".join(f"{name} {list(shape)}" for name, shape in site.shapes)
            key = (re.sub(r"\d+", "*", site.path), site.method, shapes, site.formula)
            groups.setdefault(key, []).append(site)
        return [
            (
                key[0] if len(found) > 1 else found[0].path,
                *key[1:],
                str(len(found)),
                f"{sum(s.actual for s in found):,}",
            )
            for key, found in groups.items()
        ]

    def totals(self) -> list[str]:
        """The lines below the table."""
        lines = [
            f"trainable {self.trainable_parameters:,} ({self.percent:.4g} % of the base), "
            f"of them in adapters {self.adapter_parameters:,}; frozen {self.frozen_parameters:,}",
            f"bytes: trainable {bytes_text(self.trainable_bytes)}, gradients "
            f"{bytes_text(self.gradient_bytes)}, optimizer {bytes_text(self.optimizer_bytes)}, "
            f"frozen {bytes_text(self.frozen_bytes)}",
        ]
        if self.quantized_parameters:
            floats = self.frozen_parameters - self.quantized_parameters
            lines.append(f"quantized {self.quantized_parameters:,} of the frozen, float {floats:,}")
        return lines + [f"nothing answers to the pattern {p!r}" for p in self.unmatched]

    def __repr__(self) -> str:
        table = [HEADERS, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEADERS))]
        lines = [
            "  ".join(
                c.rjust(w) if i > 3 else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        return "\n".join([*lines, *self.totals()])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for i, header in enumerate(HEADERS):
            table.add_column(header, justify="right" if i > 3 else "left", overflow="fold")
        for row in self.rows():
            table.add_row(*map(Text, row))
        return Group(table, *map(Text, self.totals()))


HEADERS = ("path", "method", "shapes", "formula", "sites", "parameters")


def bytes_text(n: float) -> str:
    """Bytes for people, in powers of 1024.

    Example:
        >>> bytes_text(1536)
        '1.5 KiB'
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(max(n, 1), 1024)), len(units) - 1)
    return f"{n / 1024**power:.1f} {units[power]}" if power else f"{n} B"
