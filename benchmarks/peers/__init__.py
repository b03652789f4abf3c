"""What others would do with the same prompts, each in its own best way."""
