"""All SQL and all Redis. Functions take a session, say what they return, and never commit."""
