"""`make compose-dry`: docker-compose.yml run for real where there is no Docker, with images that stand in."""
