"""Compares a feature store with transformers, value by value, on the real LLM.

usage: python benchmarks/parity.py FEATURES [--model M] [--shards N] [--alone N]

For some shards the plan's own batches are run again through transformers alone, with
``output_hidden_states``, cast to bfloat16 and compared bit by bit. For some captions the LLM is run
on the caption by itself, which differs by the rounding of another batch. The uniform mix over the
store is compared with the mean of LN(h) computed online.
"""

import argparse

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel

import semroute
from semroute.pipeline.models.hub import find_model
from semroute.pipeline.text.batching import batches
from semroute.trainer.model.fusion import fuse, layer_norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features")
    parser.add_argument("--model", help="default: the location of the LLM at extraction")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--alone", type=int, default=200, help="captions to run alone")
    options = parser.parse_args()

    store = semroute.open_features(options.features)
    identity, layout = store.manifest.identity, store.manifest.layout
    source = find_model(options.model or store.manifest.provenance.model)
    torch.set_num_threads(layout.num_threads)
    model = AutoModel.from_pretrained(
        source.folder, dtype=getattr(torch, identity.dtype), attn_implementation=identity.attention
    ).eval()

    @torch.inference_mode()
    def online(sequences: list[list[int]]) -> torch.Tensor:
        """Hidden states that transformers returns for a right-padded batch, [B, T, L, H]."""
        longest = max(map(len, sequences))
        tokens = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
        states = model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.stack([states[layer] for layer in identity.layers], 2)

    table = store.captions
    texts, shards = table["text"].to_pylist(), table["shard"].to_numpy()
    stored_ids = table["token_ids"].to_pylist()
    prefix = [] if identity.template.keep_prefix else identity.template.prefix_tokens
    sequences = [ids if number == 0 else prefix + ids for number, ids in enumerate(stored_ids)]
    kept = [0 if number == 0 else len(prefix) for number in range(len(store))]

    chosen = np.linspace(0, layout.num_shards - 1, min(options.shards, layout.num_shards))
    values = different = 0
    for shard in tqdm(sorted({int(s) for s in chosen}), desc="shards"):
        entries = np.flatnonzero(shards == shard)
        lengths = np.array([len(sequences[i]) for i in entries])
        for batch in tqdm([*batches(lengths, layout.batch_tokens)], desc="batches", leave=False):
            members = entries[batch]
            states = online([sequences[i] for i in members]).to(torch.bfloat16)
            rows = store.read(members)
            for position, entry in enumerate(members):
                expected = states[position, kept[entry] : len(sequences[entry])]
                found = rows.tensor()[rows.offsets[position] : rows.offsets[position + 1]]
                different += int((found.view(torch.int16) != expected.view(torch.int16)).sum())
                values += expected.numel()
    print(f"same batches: {different:,} of {values:,} stored values differ from transformers'")

    rng = np.random.default_rng(0)
    some = rng.choice(len(store), min(options.alone, len(store)), replace=False)
    relative, equal, compared, mixes = [], 0, 0, []
    for entry in tqdm(some, desc="alone"):
        state = online([sequences[entry]])[0, kept[entry] :]
        found = store.read([entry]).tensor()
        equal += int((found == state.to(torch.bfloat16)).sum())
        compared += found.numel()
        reference, ours = layer_norm(state), layer_norm(found)
        relative.append(((ours - reference).norm(dim=-1) / reference.norm(dim=-1)).flatten())
        mean = reference.mean(1)
        mixes.append((fuse(found, None)[:, 0] - mean).norm(dim=-1) / mean.norm(dim=-1))
    errors, mix = torch.cat(relative), torch.cat(mixes)
    print(
        f"captions alone: {equal / compared:.2%} of {compared:,} bfloat16 values are equal; "
        f"LN(h) differs by {errors.mean():.2e} on average, {errors.max():.2e} at most"
    )
    print(
        f"uniform over the store against the mean of LN(h) online, {len(mix):,} tokens: "
        f"{mix.mean():.2e} on average, {mix.max():.2e} at most"
    )
    longest = int(np.argmax([len(s) for s in sequences]))
    print(f"(longest caption: {len(sequences[longest])} tokens, {texts[longest][:60]!r}...)")


if __name__ == "__main__":
    main()
