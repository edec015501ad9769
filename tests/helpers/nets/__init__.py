"""Hand-written nets and training steps, by which what judges plans is judged itself."""

from __future__ import annotations

from tests.helpers.nets import features, heads, operators, positions, projections, whole_models
from tests.helpers.nets.frame import Net

NETS: tuple[Net, ...] = (
    *features.NETS,
    *operators.NETS,
    *heads.NETS,
    *projections.NETS,
    *positions.NETS,
    *whole_models.NETS,
)
