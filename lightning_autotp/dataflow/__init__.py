"""Dataflow: what each rank holds of every tensor, and what operators make of it."""
