"""A plan, made true of a model."""
