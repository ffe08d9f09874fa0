"""Rewards of encoded pairs together with all that the data says of them."""

from __future__ import annotations

import numpy as np

from btrm_core.data.pairs import PairData
from btrm_core.data.store import TokenStore
from btrm_core.evaluation import PairRewards, PairText


def with_rewards(data: PairData, pairs: TokenStore, reward_P2: np.ndarray, model: str, source: str) -> PairRewards:
    """What an evaluation is computed from.

    Args:
        data: the pairs.
        pairs: those of them that could be encoded.
        reward_P2: rewards of the encoded pairs, chosen and rejected.
        model: what gave the rewards.
        source: where the pairs are from, for the reader.

    Returns:
        The rewards [P, 2] of the encoded pairs, with what the data says of them.
    """
    import pyarrow.compute as pc

    index_P = pairs.index_P
    columns = data.dataset.with_format("arrow").select_columns(["id", "chosen", "rejected", "margin"])[:]
    characters = [pc.utf8_length(columns[side]).to_numpy().astype(np.int64) for side in ("chosen", "rejected")]
    ids = columns["id"].to_pylist()

    def text(place: int) -> PairText:
        pair = data[int(index_P[place])]
        return PairText(tuple((m["role"], m["content"]) for m in pair.prompt), pair.chosen, pair.rejected)

    return PairRewards(
        model=model,
        data=source,
        id_P=[str(ids[i]) for i in index_P],
        subset_P=pairs.subsets(),
        prompt_P=data.prompt_hash_P[index_P],
        reward_P2=np.asarray(reward_P2, dtype=np.float64),
        tokens_P2=pairs.places.tails_P2.astype(np.int64),
        characters_P2=np.stack(characters, axis=1)[index_P],
        probability_P=pairs.probability_P.astype(np.float64),
        data_margin_P=columns["margin"].to_numpy().astype(np.float64)[index_P],
        text=text,
    )
