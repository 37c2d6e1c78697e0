"""The one door to the numbers."""
