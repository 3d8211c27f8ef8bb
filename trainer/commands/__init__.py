"""The commands that train and look at runs, one file per group."""
