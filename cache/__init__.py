"""What has been answered before: exact keys, and semantic entries that are served only with a certificate."""
