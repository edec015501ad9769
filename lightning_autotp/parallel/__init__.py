"""What runs inside a training step: collectives with their gradients, and the layers built on them."""
