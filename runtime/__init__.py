"""What every layer may use: settings, errors, logs, the clock. Imports nothing of ours above it."""
