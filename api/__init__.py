"""The HTTP door: the OpenAI-compatible API, our extras, and the page. It must not hold business rules."""
