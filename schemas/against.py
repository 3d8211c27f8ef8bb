"""``against.json``: a store was compared with a pipeline's own text encoding, and passed."""

from .contract import Contract


class Against(Contract):
    """``against.json`` in a store: its rows are those of a pipeline of diffusers."""

    pipeline: str
    """Hub id with commit, or folder."""
    pipeline_class: str
    files: dict[str, str]
    """File -> sha256, of the text encoders; tokenizer -> sha256 of its state."""
    captions: list[int]
    """caption_id of every caption that was compared, the null caption included."""
    max_difference: float
    """Largest difference of a row from the pipeline's, relative to the deviation of the latter."""
    tolerance: float
    """Largest difference allowed: the codec's own error, and that of the LLM's dtype."""
    created: str
    """UTC, ISO 8601."""
