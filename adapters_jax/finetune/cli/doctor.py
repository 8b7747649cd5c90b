"""`adapters-jax doctor`: checks the installation and the devices by a tiny step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from adapters_jax.errors import UserError
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command


@dataclass(frozen=True)
class Doctor(Command):
    """Checks that versions go together, that jax uses the devices, and that a step is right.

    It lists versions, the environment's settings, and the devices with their memory; then it trains
    LoRA on one layer for a step, in float32 and bfloat16, and compares it with the formula. Where
    something is wrong, it says what to do, and its exit status is 2.
    """

    examples = """\
  adapters-jax doctor
  adapters-jax doctor --json"""

    def prepare(self, console: Console) -> Callable[[], None]:
        """Returns a function that examines and reports.

        The function raises UserError where something is wrong.
        """
        from adapters_jax.finetune.doctor import examine

        def report() -> None:
            findings = []
            for each in examine():
                findings.append(each)
                console.say(f"{'x' if each.problem else ' '} {each.subject:<20} {each.found}")
            problems = [each.problem for each in findings if each.problem]
            console.result({"findings": list(map(asdict, findings)), "problems": problems})
            if problems:
                raise UserError("; ".join(problems))
            console.say("nothing is wrong")

        return report
