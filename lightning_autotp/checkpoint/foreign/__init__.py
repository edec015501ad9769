"""Checkpoints that others have written, opened as if they were ours."""
