"""What is known against what we depend on, and what must not stand in the tree: `make audit`."""
