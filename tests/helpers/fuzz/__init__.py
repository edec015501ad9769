"""Random small nets with random rules, by seed."""
