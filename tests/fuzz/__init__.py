"""Fuzzing of our own parsers, and of the HTTP contract: inputs that nobody would send, and what holds all the same."""
