"""Training steps of different styles, and some that become wrong late."""

from __future__ import annotations

from tests.helpers.nets import steps_automatic, steps_late, steps_manual
from tests.helpers.nets.step_frame import Step

STEPS: tuple[Step, ...] = (*steps_automatic.STEPS, *steps_manual.STEPS)

LATE: tuple[Step, ...] = steps_late.LATE
