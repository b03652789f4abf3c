"""Measurements as ratios of two things in one run; results/ holds the last of each."""
