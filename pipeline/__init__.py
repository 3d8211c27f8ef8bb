"""Offline: captions -> hidden states -> codec -> store, and images -> latents -> store."""
