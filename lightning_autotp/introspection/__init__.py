"""What the names and the source of a model say of it."""
