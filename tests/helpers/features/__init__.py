"""What a user turns on in a Trainer, each as a small run that a plain Trainer makes, too."""
