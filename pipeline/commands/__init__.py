"""The commands that make stores and look at them, and what all commands share."""
