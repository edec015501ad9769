"""Tests of lightning_autotp; helpers are imported as ``from tests.helpers.models import ...``."""

import pytest

pytest.register_assert_rewrite("tests.helpers")
