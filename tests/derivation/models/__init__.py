"""Hand-written models without rules, in the usual styles of the wild."""

from __future__ import annotations

from tests.derivation.models import attention, mixtures, sequences, vision, writes
from tests.derivation.models.frame import Model

MODELS: tuple[Model, ...] = (*attention.MODELS, *sequences.MODELS, *vision.MODELS, *mixtures.MODELS, *writes.MODELS)
