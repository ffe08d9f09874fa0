"""The reward model: backbone, head, and rewards at given positions.

The backbone of a transformers sequence-classification model is called as a module, the hidden states
at the reward positions are gathered, and only they meet the head, in float32. The model's own
`forward` is never used: it scores every token and then looks for the last token that is not the pad
token, which is wrong for packed rows and for tokenizers whose pad token ends the text.

Give a `RewardModel` to DDP or DeepSpeed whole. All weights are used inside the forward pass of the
module that owns them, so hooks that gather partitioned weights fire. `RewardModel.hf` remains an
ordinary transformers (or peft) model: save that.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from btrm_core.errors import ConfigError
from btrm_core.model.attention import choose_kernel, masks_for, registered_name, uses_softcap
from btrm_core.model.leakage.positions import fresh_positions
from btrm_core.model.parallel.share import RowShare
from btrm_core.packing import PADDED, Batch


class RewardHead(nn.Linear):
    """The linear head, multiplied in float32 (or float64) whatever its weight and input are.

    It takes over the parameters of an existing layer, under the same names, so that checkpoints and
    optimizers see `score.weight` as before.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return [..., out] rewards of [..., H] hidden states, at least float32, autocast or not.

        Args:
            input: hidden states in any floating type; H is the head's `in_features`.
        """
        dtype = torch.promote_types(input.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(dtype), self.weight.to(dtype), bias)


def keep_in_memory(hf: Any, device: torch.device) -> Any:
    """Copy the weights that are a mapped file, which somebody may write anew meanwhile, and that nothing else copies.

    Args:
        hf: The model, not yet on another device; what is trained, and what ZeRO-3 has spread over processes, is left
            alone.
        device: Where it computes; to another one than the CPU everything is copied anyway.

    Returns:
        The same model.
    """
    for tensor in (*hf.parameters(), *hf.buffers()) if device.type == "cpu" else ():
        mapped = not hasattr(tensor, "ds_id") and not tensor.untyped_storage().resizable()
        if mapped and not tensor.requires_grad:
            tensor.data = tensor.data.clone()
    return hf


def _install_head(parent: nn.Module, name: str) -> None:
    """Replace the linear layer `parent.name`, also inside peft's wrapper of a trained head."""
    module = parent.get_submodule(name)
    if isinstance(module, nn.Linear):
        if not isinstance(module, RewardHead):
            parent.add_module(name, RewardHead(module))
        return
    for child, _ in list(module.named_children()):
        _install_head(module, child)


def choose_for(hf: Any, requested: str, device_type: str, allowed: Sequence[str] = ()) -> str:
    """Decide the attention kernel for a model: `attention.choose_kernel` with the model's own facts.

    Args:
        hf: the transformers model.
        requested: the user's setting, "auto" or a kernel's name.
        device_type: where it will run.
        allowed: the kernels the family's recipe allows; empty allows all.

    Returns:
        A kernel for `RewardModel`; "padded" if "auto" is asked for and the model cannot change its
        attention.

    Raises:
        ConfigError: the kernel asked for cannot be used.
    """
    kernel = choose_kernel(
        requested,
        device_type=device_type,
        softcap=uses_softcap(hf.config),
        allowed=allowed,
        half=hf.dtype in (torch.float16, torch.bfloat16),
    )
    return PADDED if requested == "auto" and not hf._can_set_attn_implementation() else kernel


class RewardModel(nn.Module):
    """Rewards of sequences, from packed rows or from padded lines.

    Args:
        hf: a transformers `…ForSequenceClassification` with one label, or a peft model around one.
        kernel: the attention kernel of packed rows (`attention.KERNELS`), or "padded" for padded
            batches through the model's own attention.

    Raises:
        ConfigError: the model has no one-label head called `score`.

    Attributes:
        hf: the model as given, with its head computing in float32.
        kernel: the kernel in use.
        one_by_one: whether padded lines are computed one at a time, each in its own length: for models whose rewards
            would depend on the batch.
        share: the part of every packed row that this process computes; None computes whole rows.
        notes: what the user should know of the base model, one line each.
    """

    def __init__(self, hf: Any, kernel: str = PADDED) -> None:
        super().__init__()
        self.hf = hf
        base = self.base_model
        if not isinstance(getattr(base, "score", None), nn.Module) or base.config.num_labels != 1:
            raise ConfigError(
                f"{type(base).__name__} has no head 'score' with one label; expected a sequence-classification "
                "model loaded with num_labels=1"
            )
        _install_head(base, "score")
        self.kernel = kernel
        self.one_by_one = False
        self.share: RowShare | None = None
        self.notes: tuple[str, ...] = ()
        self._takes_positions = "position_ids" in inspect.signature(self._backbone_of(base).forward).parameters
        self.use_kernel(kernel)

    @property
    def base_model(self) -> Any:
        """The transformers model itself, without a peft wrapper."""
        return self.hf.get_base_model() if hasattr(self.hf, "peft_config") else self.hf

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def use_kernel(self, kernel: str) -> None:
        """Switch the attention kernel. Not between a forward pass and its backward pass.

        "padded" selects the model's own attention: eager where it soft-caps scores (some versions of
        transformers would choose one that drops the cap), else PyTorch's fused attention.

        Args:
            kernel: one of `attention.KERNELS`, or "padded".

        Raises:
            ConfigError: the model cannot change its attention.
        """
        base = self.base_model
        if kernel == PADDED:
            fused = base._supports_sdpa and not uses_softcap(base.config)
            name = "sdpa" if fused else "eager"
        else:
            name = registered_name(kernel)
        self._set_attention(name)
        self.kernel = kernel

    def _set_attention(self, name: str) -> None:
        base = self.base_model
        base.set_attn_implementation(name)
        if base.config._attn_implementation != name:
            raise ConfigError(
                f"{type(base).__name__} cannot change its attention to '{name}'; "
                "expected a model that uses transformers' attention interface"
            )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the rewards [S] of a batch's sequences, float32 (float64 for a float64 model).

        Processes that share rows give the same batch and get the same rewards; all gradients of theirs together are
        those of one process.

        Args:
            batch: a packed row, or padded lines. Padded lines take transformers' own attention
                whatever the kernel.

        Raises:
            NotImplementedError: the model's attention cannot be packed.
            ValueError: the kernel is "padded", and the batch is a packed row of several sequences.
        """
        hidden_TH = self.hidden(batch).flatten(0, 1)
        share = self._share_of(batch)
        if share is not None:
            index_S, is_own_S = share.owned(batch.reward_index, batch.input_ids.shape[1])
            return share.together(self._read(hidden_TH, index_S), is_own_S)
        rewards_S = self._read(hidden_TH, batch.reward_index)
        return rewards_S if self.share is None else self.share.counted_once(rewards_S)

    def _read(self, hidden_TH: torch.Tensor, index_S: torch.Tensor) -> torch.Tensor:
        rewards: torch.Tensor = self.base_model.score(hidden_TH.index_select(0, index_S))
        return rewards.squeeze(-1)

    def _share_of(self, batch: Batch) -> RowShare | None:
        """The part of a batch that this process computes; None if it computes all of it."""
        divided = batch.visibility is not None and self.kernel != PADDED
        if self.share is None or not divided or not self.share.divides(batch.input_ids.shape[1]):
            return None
        return self.share

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Return the backbone's last hidden states [B, T, H] of a batch; raises as `forward` does.

        Args:
            batch: a packed row (B is 1), or padded lines; hidden states at padding mean nothing. Of a row that is
                shared, T counts this process's own tokens.
        """
        if batch.visibility is None:
            return self._line_by_line(batch) if self.one_by_one else self._backbone(batch, batch.attention_mask)
        if self.kernel == PADDED:
            if len(batch.visibility.runs) > 1:
                raise ValueError("kernel 'padded' takes padded lines, not a packed row of several sequences")
            return self._backbone(batch, None)
        share, length = self._share_of(batch), batch.input_ids.shape[1]
        own = slice(0, length) if share is None else share.own(length)
        ids, positions = batch.input_ids[:, own], batch.position_ids[:, own]
        with masks_for(batch.visibility, share):
            # A mask of ones keeps transformers from looking for packed sequences in the positions.
            return self._run(ids, torch.ones_like(ids), positions)

    @staticmethod
    def _backbone_of(base: Any) -> Any:
        return getattr(base, base.base_model_prefix)

    def _backbone(self, batch: Batch, mask: torch.Tensor | None) -> torch.Tensor:
        return self._run(batch.input_ids, mask, batch.position_ids)

    def _run(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        # Some models count positions themselves, or have none: those cannot be packed, which the self-check finds.
        more = {"position_ids": positions} if self._takes_positions else {}
        output = self._backbone_of(self.base_model)(input_ids=ids, attention_mask=mask, use_cache=False, **more)
        hidden: torch.Tensor = output[0]
        return hidden

    def _line_by_line(self, batch: Batch) -> torch.Tensor:
        """Hidden states [B, T, H] of padded lines that are computed one at a time, zeros where they are padded."""
        ids, positions = batch.input_ids, batch.position_ids
        lines = []
        for line, length in enumerate(batch.lengths or [ids.shape[1]] * len(ids)):
            with fresh_positions(self.base_model):
                part = slice(line, line + 1), slice(0, length)
                hidden = self._run(ids[part], torch.ones_like(ids[part]), positions[part])
            lines.append(F.pad(hidden, (0, 0, 0, ids.shape[1] - length)))
        return torch.cat(lines)

    @contextlib.contextmanager
    def own_attention(self) -> Iterator[None]:
        """While active, the model takes padded lines through its own eager attention: the reference."""
        kernel = self.kernel
        try:
            self._set_attention("eager")
            self.kernel = PADDED
            yield
        finally:
            self.use_kernel(kernel)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed matrices, and norms, biases and the head without decay.

    Args:
        module: the reward model, under ZeRO-3 too; frozen parameters are in no group.
        weight_decay: of AdamW (arXiv:1711.05101), for the first group.

    Returns:
        Groups as torch's optimizers take them; an empty one is left out.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        is_plain = dimensions < 2 or "score." in name or "norm" in name.lower()
        (plain if is_plain else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
