"""Captions and images into stores, offline."""
