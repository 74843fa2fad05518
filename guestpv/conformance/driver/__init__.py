"""Checking a driver: a strict device that behaves well, watches everything and provokes."""
