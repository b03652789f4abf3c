"""Documents as text: what a file is, its Markdown, its passages, and how they stand in a prompt. No rows, no engine."""
