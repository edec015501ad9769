"""Models and data to copy from: small, ordinary Lightning code in which nothing knows about tensor parallelism."""
