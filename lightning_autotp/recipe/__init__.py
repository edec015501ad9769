"""The recipe, written once: a plan, a sharded model, and what happens around its steps."""
