"""From stores to runs."""
