"""Everything that speaks to inference servers: the OpenAI protocol, the engine processes we start."""
