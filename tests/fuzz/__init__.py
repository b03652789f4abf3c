"""Fuzzing of our own parsers, and of the HTTP contract: bytes that nobody would send, and what must hold all the same."""
