"""Step time of this package beside other ways to train with tensor parallelism; see README.md here."""
