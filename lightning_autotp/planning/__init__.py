"""From rules and a model to a plan. Pure."""
