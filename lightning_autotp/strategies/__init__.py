"""Lightning's strategies."""
