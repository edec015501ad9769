"""What is decided about a model, and how people see it."""
