"""What is tied: what the user said, checked."""
