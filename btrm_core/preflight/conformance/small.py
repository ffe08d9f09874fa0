"""A checkpoint's architecture with two small layers, to be tried in a second or two whatever its size."""

from __future__ import annotations

from typing import Any

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def small_config(original: Any, num_tokens: int) -> Any:
    """The configuration of a copy with two small layers, of two kinds if the original has several.

    Args:
        original: The transformers configuration of the text model; it stays as it is.
        num_tokens: Length of the tokenizer; the copy has at least so many embeddings.
    """
    given, layers = original.to_dict(), original.num_hidden_layers
    by_layer = {key: value for key, value in given.items() if isinstance(value, list) and len(value) == layers > 1}
    other = (n for n in range(1, layers) if any(kinds[n] != kinds[0] for kinds in by_layer.values()))
    second = next(other, 1)
    derived = {key for key in SMALL if getattr(getattr(type(original), key, None), "fset", key) is None}
    latent = bool(given.get("qk_rope_head_dim"))  # its heads have dimensions of their own, and all have keys
    small = {key: value for key, value in SMALL.items() if key not in derived and not (latent and key == "head_dim")}
    if latent:
        small["num_key_value_heads"] = small["num_attention_heads"]
    values = {**given, **small, **{key: [kinds[0], kinds[second]] for key, kinds in by_layer.items()}}
    values["vocab_size"] = max(num_tokens, original.vocab_size)
    if not latent:
        _fit_factors(values, float(getattr(original, "partial_rotary_factor", None) or 1.0))
    return type(original)(**{k: v for k, v in values.items() if v is not None or k.endswith("token_id")})


def _fit_factors(values: dict[str, Any], partial: float) -> None:
    """Fit the lists of a long rotary embedding, one factor for each pair of dimensions, to the small heads."""
    for key, value in values.items():
        if isinstance(value, dict):
            _fit_factors(value, float(value.get("partial_rotary_factor") or partial))
        elif key in ("short_factor", "long_factor") and isinstance(value, list):
            pairs = int(SMALL["head_dim"] * partial) // 2
            values[key] = (value + value[-1:] * pairs)[:pairs]
