"""Receipts: the files of a shard, and what was counted in it."""

from collections.abc import Collection, Iterator

from ....schemas import Layout, Receipt

ERRORS = {"mean", "max", "mean_without_top3", "max_without_top3"}
"""Keys of the error of a codec."""


def receipt_faults(
    receipt: Receipt, shard: int, layout: Layout, files: Collection[str]
) -> Iterator[str]:
    """What a receipt says that cannot be.

    Args:
        shard: that it must be about.
        files: of that shard.
    """
    if receipt.shard != shard:
        yield f"is about shard {receipt.shard}"
    if {*receipt.files} != {*files}:
        yield f"lists {sorted(receipt.files)[:3]}; expected a file of every array: {sorted(files)}"
    if any(file.num_bytes < 1 for file in receipt.files.values()):
        yield "lists an empty file"
    if not (1 <= receipt.num_rows <= layout.rows_per_shard and receipt.num_entries >= 1):
        yield f"counts {receipt.num_entries:,} entries and {receipt.num_rows:,} rows"
    if receipt.codec_error and {*receipt.codec_error} != ERRORS:
        yield f"codec_error has {sorted(receipt.codec_error)}; expected {sorted(ERRORS)}"
    if not all(layer.isdecimal() and len(layer) < 10 for layer in receipt.layer_error):
        yield "layer_error names what is no layer"
