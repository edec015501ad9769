"""Cross entropies of a vocabulary that ranks share."""
