"""What happens around the steps of a sharded model."""
