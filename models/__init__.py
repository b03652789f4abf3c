"""The rows, wire messages and request schemas of Stoker. Imports runtime only; knows no connection."""
