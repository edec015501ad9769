"""Does a tensor parallel plan give the unsharded model's numbers? :func:`verify` trains a model whole and sharded, all
ranks in this process, for a few steps in fp64, and compares the loss of every step, every gradient of every step and
every weight at the end; what several ranks hold must be bit-equal on all of them. ``lightning-autotp verify`` is
:mod:`~lightning_autotp.cli.verify`.
"""

from lightning_autotp.verification.report import Report, Row
from lightning_autotp.verification.verify import verify

__all__ = ["Report", "Row", "verify"]
