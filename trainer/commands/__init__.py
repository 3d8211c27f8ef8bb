"""The commands that train and look at runs."""
