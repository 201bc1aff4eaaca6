"""Dynamic loss scaling for float16, whose gradients would underflow: multiply the loss, divide the gradients."""

from __future__ import annotations

from dataclasses import dataclass

from xkd_fast.errors import UserError

FIRST, GROWTH_INTERVAL, LEAST = 2.0**16, 2000, 2.0**-14


@dataclass
class LossScale:
    """The factor: halved after a step whose gradients overflowed, doubled after 2000 steps without one."""

    value: float = 1.0
    good_steps: int = 0

    @classmethod
    def for_precision(cls, precision: str) -> LossScale:
        """65536 to begin with for float16; other types need none."""
        return cls(FIRST if precision == "float16" else 1.0)

    def update(self, *, overflowed: bool) -> None:
        """Take in whether a step's gradients overflowed.

        Raises:
            UserError: they did at the smallest factor too, so it is not the scaling that makes them infinite.
        """
        if overflowed:
            self.value, self.good_steps = self.value / 2, 0
            if self.value < LEAST:
                raise UserError(
                    "the gradients stay infinite however small the loss is scaled in float16; start a new run (another output) "
                    "with a lower optimizer.lr, or with train.precision=bfloat16 or float32"
                )
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0
