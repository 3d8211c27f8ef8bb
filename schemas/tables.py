"""Arrow schemas of the tables of a store."""

import pyarrow as pa

CAPTIONS_SCHEMA = pa.schema(
    [
        pa.field("caption_id", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("num_cut_tokens", pa.int32(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row_start", pa.int64(), nullable=False),
        pa.field("row_stop", pa.int64(), nullable=False),
    ]
)
"""``captions.parquet``: one row per unique caption, in store order; row 0 is the null caption.

``token_ids`` are the tokens of the stored rows; ``num_cut_tokens`` is the number that max_length
cut off."""

CONDITIONING_CAPTIONS_SCHEMA = pa.schema(
    [
        CAPTIONS_SCHEMA.field(name)
        for name in ("caption_id", "text", "token_ids", "shard", "row_start", "row_stop")
    ]
)
"""``captions.parquet`` of a conditioning store, of the same captions in the same order.

``token_ids`` are the tokens of the caption's own rows."""

SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("caption_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("image", pa.string()),
    ]
)
"""``samples.parquet`` of a store of captions: one row per input row, in input order."""

WEIGHTS = "caption_weights"
"""Column of samples that has the weights of their captions, if extraction was given some."""
SAMPLES_EXTRA = pa.schema(
    [
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field(WEIGHTS, pa.list_(pa.float64()), nullable=False),
    ]
)
"""Further columns of the samples of a store of captions. ``source_row``, where rows of the input
had no caption: the input row of each sample. ``caption_weights``, where the columns of captions had
weights: one per caption of the sample, which training shows them by."""

LATENT_SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("image", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("bucket", pa.int32(), nullable=False),
    ]
)
"""``samples.parquet`` of a latent store: one row per input row, in input order."""
