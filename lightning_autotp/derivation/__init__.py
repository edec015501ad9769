"""Plans without rules: which features must be on one rank is read off a run of the model, not off names."""
