"""Made-up rewards of pairs."""

from __future__ import annotations

import numpy as np

from btrm_core.evaluation import PairRewards, PairText


def made(pairs=40, *, seed=3, text=True, model="m", data="held/out.jsonl", shift=0.7):
    rng = np.random.default_rng(seed)
    reward_P2 = rng.normal(0, 1, (pairs, 2)) + np.array([shift, 0])
    return PairRewards(
        model=model,
        data=data,
        id_P=[f"row:{i}" for i in range(pairs)],
        subset_P=["hard" if i % 3 == 0 else "easy" for i in range(pairs)],
        prompt_P=np.arange(pairs, dtype=np.uint64) // 2 + 5,
        reward_P2=reward_P2,
        tokens_P2=rng.integers(1, 50, (pairs, 2)),
        characters_P2=rng.integers(1, 200, (pairs, 2)),
        probability_P=np.ones(pairs),
        data_margin_P=rng.integers(1, 4, pairs).astype(float),
        text=(lambda i: PairText((("user", f"question {i} – é"),), f"good {i}", f"bad {i}")) if text else None,
    )
