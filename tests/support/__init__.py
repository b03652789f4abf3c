"""What tests of several packages lean on: real servers whose behaviour a test can state."""
