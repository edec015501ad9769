"""Everything that runs a model to look at it: does a plan give the numbers of the unsharded model."""
