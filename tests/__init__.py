"""Tests of lightning_autotp; helpers are imported as ``from tests.helpers.models import ...``."""
