"""Online: cached features and latents -> a DiT and its routing weights, without the LLM."""
