"""Counts against really built models, kept activations against autograd, states against real DeepSpeed engines."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import CONFIGS, SIZE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from btrm_core.data.quality import Sharing
from btrm_core.errors import BtrmError, ConfigError
from btrm_core.model import shape as shape_module
from btrm_core.model.parallel import exchange
from btrm_core.model.parallel.share import RowShare
from btrm_core.model.savings import recompute_activations
from btrm_core.model.shape import Parameters, read_shape
from btrm_core.packing.cuts import KEYS_PER_TOKEN
from btrm_core.preflight.plan import activations, memory
from btrm_core.preflight.plan.estimate import PRESETS, Estimate, estimate, format_estimate, reach, read_zero, to_dict
from btrm_core.preflight.plan.hardware import ASSUMED_MFU, GIB, read_hardware
from btrm_core.preflight.plan.memory import Zero
from btrm_core.preflight.plan.workload import Workload
from btrm_core.settings import ModelConfig

GEMMA_7B = CONFIG_MAPPING["gemma"](
    hidden_size=3072,
    intermediate_size=24576,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=256,
    vocab_size=256000,
)
GEMMA_2B = CONFIG_MAPPING["gemma"](
    hidden_size=2048,
    intermediate_size=16384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=256,
    vocab_size=256000,
)
LLAMA3_8B = CONFIG_MAPPING["llama"](
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


@torch.library.custom_op("btrm_plan::attention", mutates_args=())
def attention_of_a_kernel(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel gives is kept by selective checkpointing, which knows it by its name."""
    return torch.empty_like(q).normal_(), q.new_empty(q.shape[:-1], dtype=torch.float32)


@attention_of_a_kernel.register_fake
def _(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


class FlashLike(torch.autograd.Function):
    """Attention that keeps what flash attention keeps: query, key, value, output, log-sum-exp; no T x T matrix."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, log_sums = attention_of_a_kernel(q)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def flash_like(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return FlashLike.apply(*(t.transpose(1, 2).contiguous() for t in (q, k, v))), None


AttentionInterface.register("kept_by_kernel", flash_like)


def tiny_config(name: str, **changes: Any) -> Any:
    model_type, special = CONFIGS[name]
    return CONFIG_MAPPING[model_type](**{**SIZE, **special, **changes})


def build(config: Any, dtype: torch.dtype, device: str = "cpu", layers: int | None = None) -> Any:
    if layers is not None:
        changes = {"num_hidden_layers": layers}
        if getattr(config, "layer_types", None):
            changes["layer_types"] = config.layer_types[:1] * layers
        config = type(config).from_dict({**config.to_dict(), **changes})
    with torch.device(device):
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=dtype, attn_implementation="kept_by_kernel"
        )
    return model.train()


def backbone(model: Any, tokens: int) -> torch.Tensor:
    device = model.score.weight.device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    positions = torch.arange(tokens, device=device)[None]
    return model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state


def kept_bytes(model: Any, tokens: int) -> int:
    """Bytes of the distinct storages that autograd saves in one forward pass, parameters and buffers apart."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = backbone(model, tokens)
    del hidden
    return sum(storage.nbytes() for storage in seen.values())


# --- parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_the_built_model(name):
    config = tiny_config(name)
    parameters, shape = read_shape(config)
    built = AutoModelForSequenceClassification.from_config(config)
    assert parameters.total == parameters.trainable == sum(p.numel() for p in built.parameters())
    assert parameters.embedding == built.get_input_embeddings().weight.numel()
    assert parameters.head == built.score.weight.numel()
    assert parameters.per_layer == sum(p.numel() for p in built.model.layers[0].parameters())
    assert parameters.norm == sum(p.numel() for n, p in built.named_parameters() if "norm" in n)
    assert parameters.largest == max(p.numel() for p in built.parameters())
    assert len(shape.windows) == config.num_hidden_layers
    assert shape.intermediate == config.intermediate_size


def test_reading_a_shape_leaves_the_configuration_alone():
    config = tiny_config("llama3", num_labels=2)
    read_shape(config)
    assert config.num_labels == 2


def test_windows_are_those_of_each_layer():
    assert read_shape(tiny_config("mistral"))[1].windows == (9, 9)
    assert read_shape(tiny_config("gemma2"))[1].windows == (9, None)
    assert read_shape(tiny_config("llama3"))[1].windows == (None, None)


def test_known_models_have_their_published_sizes():
    # the causal models' published counts: 8.54 B with a tied embedding; 8.03 B less a 128256 x 4096 vocabulary head
    assert read_shape(GEMMA_7B)[0].total == 8_537_680_896 + 3072
    assert read_shape(LLAMA3_8B)[0].total == 8_030_261_248 - 128256 * 4096 + 4096


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        (
            "bert",
            {},
            "cannot plan for model type 'bert': BertForSequenceClassification has no linear head called `score`",
        ),
        ("mixtral", {"num_hidden_layers": 1}, "cannot plan for model type 'mixtral': its layers are not one attention"),
        (
            "mamba",
            {"num_hidden_layers": 1},
            "cannot plan for model type 'mamba': transformers builds no sequence-classification model",
        ),
    ],
)
def test_unknown_architectures_are_refused_in_one_line(model_type, changes, message):
    with pytest.raises(BtrmError) as caught:
        read_shape(CONFIG_MAPPING[model_type](**changes))
    assert str(caught.value).startswith(message)
    assert "expected a" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpoint:FutureWarning")
def test_lora_counts_and_kept_bytes_are_those_of_peft():
    peft = pytest.importorskip("peft")
    config, rank, tokens = tiny_config("llama3"), 4, 64
    parameters, shape = read_shape(config, rank)

    def kept(layers: int) -> int:
        model = build(config, torch.float32, layers=layers)
        lora = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="SEQ_CLS", lora_dropout=0.0)
        wrapped = peft.get_peft_model(model, lora)
        trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        assert trainable == parameters.adapters * layers // 2 + parameters.head
        return kept_bytes(wrapped.base_model.model, tokens)

    per_layer = activations.saved_per_token(shape, bf16=False, lora_rank=rank)
    assert tokens * per_layer == pytest.approx(kept(3) - kept(2), rel=0.02)
    assert parameters.trainable == parameters.adapters + parameters.head


# --- activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_kept_activations_are_what_autograd_saves(name, dtype):
    config, tokens = tiny_config(name), 64
    shape = read_shape(config)[1]
    one, two = (kept_bytes(build(config, dtype, layers=n), tokens) for n in (1, 2))
    per_layer = tokens * activations.saved_per_token(shape, bf16=dtype == torch.bfloat16)
    assert per_layer == pytest.approx(two - one, rel=0.02)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpoint:FutureWarning")
def test_checkpointing_keeps_one_hidden_state_per_layer():
    config, tokens = tiny_config("llama3"), 64
    models = [build(config, torch.bfloat16, layers=n) for n in (1, 2)]
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    one, two = (kept_bytes(model, tokens) for model in models)
    assert two - one == tokens * 2 * config.hidden_size


class Peak(TorchDispatchMode):
    """Most bytes of tensors alive at once, parameters and buffers apart; works on the meta device."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


RECOMPUTED: dict[activations.Kept, ModelConfig] = {
    "all": ModelConfig(),
    "inputs": ModelConfig(gradient_checkpointing=True),
    "products": ModelConfig(selective_checkpointing=True),
}


@pytest.mark.parametrize("kept", RECOMPUTED)
@pytest.mark.parametrize("config", [GEMMA_2B, LLAMA3_8B], ids=["gemma-2b", "llama3-8b"])
def test_peak_of_a_whole_simulated_step(config, kept):
    tokens = 8192
    tracked = peak_of_a_step(build(config, torch.bfloat16, device="meta"), tokens, RECOMPUTED[kept])
    estimated = activations.activations(read_shape(config)[1], tokens, kept=kept)
    assert estimated == pytest.approx(tracked, rel=0.05)


def peak_of_a_step(model: Any, tokens: int, config: ModelConfig) -> int:
    """Most bytes of tensors in a forward and a backward pass, parameters and their gradients apart."""
    # the embedding's gradient belongs to the buffers of `memory.memory`; other gradients go as DeepSpeed takes them
    model.get_input_embeddings().requires_grad_(False)
    model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    recompute_activations(model, config)
    with Peak(model) as tracked:
        hidden = backbone(model, tokens)
        rewards = hidden[0, :8].float() @ model.score.weight.float().T
        del hidden
        rewards.sum().backward()
    return tracked.peak


# --- rows that GPUs share


class GatherAll(torch.autograd.Function):
    """Twice as many keys as the row has tokens, as where two runs read all of them."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, rows])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        one, other = gradients[0].chunk(2)
        return one + other


def shared_by(count: int, *, gathers: bool = False) -> str:
    """Register attention of which one of `count` GPUs computes its share; what it would receive is made up."""
    share = RowShare(0, count, None)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: Any) -> torch.Tensor:
        query, key, value = (t[0].transpose(0, 1) for t in (q, k, v))
        if gathers:
            key, value = GatherAll.apply(key), GatherAll.apply(value)
        return FlashLike.apply(query, key, value)[None]

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        row: Any = SimpleNamespace(length=q.shape[2] * count)
        return share.attention(kernel, q, k, v, row, {}), None

    name = f"kept_by_one_of_{count}{'_gathering' if gathers else ''}"
    AttentionInterface.register(name, attention)
    return name


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        exchange, "_moved", lambda lines, send, receive, _: lines.new_empty(sum(receive), *lines.shape[1:])
    )


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize(("name", "count"), [("llama3", 2), ("llama3", 4), ("phi3", 4), ("qwen3", 4)])
def test_kept_activations_of_a_shared_row(name, count, gathers):
    config, tokens = tiny_config(name), 64
    shape = read_shape(config)[1]
    kept = []
    for layers in (1, 2):
        model = build(config, torch.bfloat16, layers=layers)
        model.set_attn_implementation(shared_by(count, gathers=gathers))
        kept.append(kept_bytes(model, tokens))
    per_token = activations.saved_per_token(shape, share=count, kv_copies=2.0 if gathers else 1.0)
    assert tokens * per_token == pytest.approx(kept[1] - kept[0], rel=0.02)
    assert per_token > activations.saved_per_token(shape, kv_copies=2.0 if gathers else 1.0)


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("kept", ["all", "inputs"])
def test_peak_of_a_simulated_step_with_shared_rows(kept):
    """An 8B model on four GPUs that share a row of 32,768 tokens; without checkpointing, of 8,192."""
    count, tokens = 4, 8192 if kept == "all" else 32768
    model = build(LLAMA3_8B, torch.bfloat16, device="meta")
    model.set_attn_implementation(shared_by(count))
    tracked = peak_of_a_step(model, tokens // count, RECOMPUTED[kept])
    estimated = activations.activations(read_shape(LLAMA3_8B)[1], tokens, kept=kept, share=count)
    assert estimated == pytest.approx(tracked, rel=0.05)
    alone = activations.activations(read_shape(LLAMA3_8B)[1], tokens, kept=kept)
    assert alone / count < estimated < 1.15 * alone / count


def test_what_is_exchanged():
    """Queries, keys and values there and outputs back, of which a quarter stays, in each layer and pass."""
    shape = read_shape(LLAMA3_8B)[1]
    a_token = 32 * (32 + 8 + 8 + 32) * 128 * 2
    assert memory.exchanged(shape, 100, 1) == 0
    assert memory.exchanged(shape, 100, 4, passes=3) == 3 / 4 * 3 * 100 * a_token
    copied = 32 * (32 + 16 + 16 + 32) * 128 * 2
    assert memory.exchanged(shape, 100, 16, bf16=False) == 15 / 16 * 2 * 100 * 2 * copied


def test_no_more_is_computed_again_than_has_to_be():
    """On eight GPUs of 80 GB ZeRO-2 has room for an 8B model's products, ZeRO-1 for its layers' inputs alone."""
    plans = {plan.preset: plan for plan in estimate(LLAMA3_8B, Workload(), read_hardware(8, "h100"))}
    assert {name: plans[name].kept for name in ("zero1", "zero2", "zero3")} == {
        "zero1": "inputs",
        "zero2": "products",
        "zero3": "all",
    }
    assert plans["zero2"].command.endswith("--selective-checkpointing")
    rates = [plans[name].pairs_per_second / plans["zero3"].pairs_per_second for name in ("zero1", "zero2")]
    assert rates == pytest.approx([0.75, 0.85])
    assert "cheap part" in format_estimate(list(plans.values()))


def test_an_8b_model_needs_shared_rows_for_128k_tokens_and_not_for_32k():
    """On eight GPUs of 80 GB, by hand: a row of two whole conversations, ZeRO-3, recomputed activations."""
    hardware = read_hardware(8, "h100")
    parameters, _ = read_shape(LLAMA3_8B)
    states = 18 * parameters.total / 8 + 2 * parameters.small  # bf16 weights, fp32 gradients, master and two moments
    # gathered around the turn of the passes and prefetched, one layer; the reduce bucket and its copy
    buffers = 2 * (parameters.largest + 50e6 + parameters.per_layer) + 2 * 2 * 500e6
    # kept of every layer, its input; of one layer norms, their products' inputs, attention, MLP; MLP's backward pass
    norms, inputs = 2 * ((4 + 2) * 4096 + 4), 2 * 2 * 4096
    attention, mlp = 2 * (2 * 4096 + 2 * 1.6 * 1024) + 4 * 32, 2 * 4 * 14336
    outside, working = 8 + 4 * 128 + 6 * 4096 + 4, 1.5 * 2 * 14336
    a_token = 32 * 2 * 4096 + norms + inputs + attention + mlp + outside + working
    for length, shares in ((32_768, (1, 2)), (131_072, (1, 2, 4, 8))):
        for share in shares:
            extra = 0 if share == 1 else 2 * 4096 + 2 * 2 * 1024  # the output again, and received keys and values
            expected = states + buffers + 2 * length / share * (a_token + extra)
            (plan,) = estimate(
                LLAMA3_8B, Workload(max_length=length, sequence_parallel=share), hardware, "zero3", "inputs"
            )
            assert plan.memory.total == pytest.approx(expected, rel=0.01)
            assert plan.fits is (length / share <= 32_768 or (length / share, share) == (32_768, 1)), (length, share)
    reached = {one.sequence_parallel: one.tokens for one in reach(estimate(LLAMA3_8B, Workload(), hardware))}
    assert list(reached) == [1, 2, 4, 8]
    assert 45_000 < reached[1] < 60_000, "32k need no sharing, 128k do"
    assert 65_536 < reached[2] < 131_072 < reached[4]
    for share in (2, 4, 8):
        assert 0.9 < reached[share] / (share * reached[1]) < 1


def test_the_text_says_from_which_length_on_rows_must_be_shared():
    hardware = read_hardware(8, "h100")
    long = Workload(model="m", max_length=131_072)
    text = format_estimate(estimate(LLAMA3_8B, long, hardware, kept="inputs"))
    (alone,) = re.findall(r"Conversations of up to ([\d,]+) tokens fit without sharing rows \(zero3, recomputing", text)
    assert 45_000 < int(alone.replace(",", "")) < 60_000
    assert "longer ones need --sequence-parallel\nwith --sequence-parallel N: N = 2: " in text
    assert "Nothing fits. Try btrm plan with: --sequence-parallel 4 --deepspeed zero3; or " in text
    shared = estimate(LLAMA3_8B, dataclasses.replace(long, sequence_parallel=4), hardware)
    text = format_estimate(shared)
    assert "rows of up to 262,144 tokens, each over 4 GPUs; " in text
    assert "btrm train --model m --data DATA --gpus 8 --sequence-parallel 4 --deepspeed " in text
    assert to_dict(shared)["longest"][0] == {
        "sequence_parallel": 1,
        "preset": "zero3",
        "tokens": int(alone.replace(",", "")),
    }
    one = format_estimate(estimate(LLAMA3_8B, hardware=read_hardware(1, "h100")))
    assert one.splitlines()[-1].endswith("longer ones need --sequence-parallel and more GPUs")
    with pytest.raises(ConfigError, match="--sequence-parallel 3 with 8 processes: expected a number of processes"):
        estimate(LLAMA3_8B, Workload(sequence_parallel=3), hardware)
    with pytest.raises(ConfigError, match="--sequence-parallel 64: the model has 32 attention heads"):
        estimate(LLAMA3_8B, Workload(sequence_parallel=64), read_hardware(64, "h100"))
    with pytest.raises(ConfigError, match="--sequence-parallel 0: expected a number above 0"):
        Workload(sequence_parallel=0)


# --- weights, gradients and optimizer of real engines


@pytest.fixture(scope="module")
def process_group():
    from btrm_core.config import read_settings
    from btrm_core.training.processes.runtime import group, start

    config = read_settings(None, {"train.learning_rate": 1e-3, "train.weight_decay": 0.0})
    with group(config), start(config) as runtime:
        # what is here already is neither counted nor visited: collecting takes milliseconds instead of seconds
        gc.collect()
        gc.freeze()
        yield runtime
        gc.unfreeze()


def storages() -> dict[int, torch.UntypedStorage]:
    gc.collect()
    found = (t.untyped_storage() for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu")
    return {s._cdata: s for s in found}


BUCKET = 100_000


def engine_config(preset: str, bf16: bool, **bf16_settings: bool) -> dict[str, Any]:
    from btrm_core.config import read_settings
    from btrm_core.training.processes.zero import deepspeed_config

    values = {"train.learning_rate": 1e-3, "train.weight_decay": 0.0, "distributed.deepspeed": preset}
    config = deepspeed_config(read_settings(None, {**values, "model.dtype": "bf16" if bf16 else "fp32"}), world=1)
    zero = config["zero_optimization"]
    # small buckets, so that the states show; everything partitioned
    zero.update(reduce_bucket_size=BUCKET, stage3_param_persistence_threshold=0)
    for key in ("offload_optimizer", "offload_param"):
        if key in zero:
            zero[key]["pin_memory"] = False
    config["bf16"].update(bf16_settings)
    return config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("preset", "bf16", "settings"),
    [(preset, bf16, {}) for bf16 in (True, False) for preset in PRESETS]
    + [("zero1", True, {"immediate_grad_update": True})],
)
def test_states_are_those_of_a_real_engine(process_group, preset, bf16, settings):
    import deepspeed

    config = engine_config(preset, bf16, **settings)
    before = storages()  # an earlier engine's tensors may live on for a while
    model = AutoModelForSequenceClassification.from_config(
        tiny_config("llama3", hidden_size=192, intermediate_size=384, vocab_size=512),
        dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    numels = [p.numel() for p in model.parameters()]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    for boundary in (False, True, False):
        engine.set_gradient_accumulation_boundary(boundary)
        loss = engine(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.float().sum()
        engine.backward(loss, scale_wrt_gas=False)
        if boundary:
            engine.step()
    gradients = [p.grad for p in model.parameters()]  # so that Python knows of them
    held = sum(s.nbytes() for key, s in storages().items() if key not in before)

    zero = Zero.from_config(config)
    parameters = Parameters(0, sum(numels), 0, 0, 0, max(numels), 0)
    states = memory.states(parameters, zero, gpus=1)
    width = 2 if bf16 else 4
    staging = width * (BUCKET if zero.stage == 3 or (zero.stage == 1 and not bf16) else 0)
    staging += width * max(numels) if zero.offload_optimizer and zero.stage == 2 else 0
    expected = states.weights + states.gradients + states.optimizer + states.host + staging
    assert held == pytest.approx(expected, rel=0.05)
    del gradients, loss
    engine.destroy()


def test_defaults_are_those_of_deepspeed():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (1, 2, 3):
        real, ours = DeepSpeedZeroConfig(stage=stage), Zero.from_config({"zero_optimization": {"stage": stage}})
        assert ours.reduce_bucket_size == real.reduce_bucket_size
        assert ours.multi_rank_allreduce == real.use_multi_rank_bucket_allreduce
        assert ours.overlap_comm == real.overlap_comm
        assert ours.prefetch_bucket_size == real.prefetch_bucket_size
        assert ours.max_reuse_distance == real.max_reuse_distance
        assert ours.sub_group_size == real.sub_group_size
        assert real.param_persistence_threshold == 100_000
    assert ours.immediate_grad_update == DeepSpeedBF16Config().immediate_grad_update


def test_presets_are_those_of_training():
    zeros = {name: read_zero(name, Workload(), 2) for name in PRESETS}
    assert [zeros[n].stage for n in PRESETS] == [1, 2, 3, 2, 3]
    assert [n for n in PRESETS if zeros[n].offload_optimizer] == ["zero2-offload", "zero3-offload"]
    assert [n for n in PRESETS if zeros[n].offload_param] == ["zero3-offload"]
    assert all(z.bf16 for z in zeros.values())
    assert [zeros[n].communication_bytes for n in PRESETS] == [4, 2, 2, 2, 2]  # stage 1 sends its sums in fp32


def test_a_users_file_is_read(tmp_path):
    file = tmp_path / "mine.json"
    zero = {"stage": 2, "reduce_bucket_size": 5e7, "overlap_comm": True}
    file.write_text(json.dumps({"zero_optimization": zero, "communication_data_type": "fp32"}))
    read = read_zero(str(file), Workload(), 1)
    assert (read.stage, read.reduce_bucket_size, read.overlap_comm, read.communication_bytes) == (
        2,
        50_000_000,
        True,
        4,
    )


@pytest.mark.parametrize(("stage", "per_parameter"), [(1, 2 + 6 + 12 / 8), (2, 2 + 16 / 8), (3, 18 / 8)])
def test_bytes_per_parameter_on_eight_gpus(stage, per_parameter):
    parameters = Parameters(0, 8_000_000, 0, 0, 0, 1000, 0)
    states = memory.states(parameters, Zero(stage=stage), gpus=8)
    assert states.weights + states.gradients + states.optimizer == per_parameter * parameters.total


def test_buffers_are_those_of_the_fullest_moment_of_a_step():
    parameters = Parameters(0, 8_000, 0, 0, 0, 1_000, 0)
    small = {"reduce_bucket_size": 500, "prefetch_bucket_size": 100, "max_reuse_distance": 2_400}

    def most(activations: int, gpus: int = 4, **settings: Any) -> int:
        found = memory.memory(parameters, Zero(**small, **settings), gpus, activations)
        return found.activations + found.buffers

    # stage 1: the bf16 copy of all gradients on the wire, once the activations are gone
    assert most(10, stage=1) == 2 * 8_000
    assert most(50_000, stage=1) == 50_000
    assert most(10, stage=1, communication_bytes=4, immediate_grad_update=True) == 2 * 1_000
    # stage 2: bucket and its copy, two buckets with overlap; at the end the largest gradient and its copy
    assert most(50_000, stage=2) == 50_000 + 2 * (500 + 500)
    assert most(50_000, stage=2, overlap_comm=True) == 50_000 + 2 * (1_000 + 500)
    assert most(10, stage=2) == 2 * (500 + 500) + 2 * 2_000
    assert most(10, gpus=1, stage=2) == 2 * (500 + 500) + 2_000
    assert most(50_000, stage=2, offload_optimizer=True) == 50_000 + 2 * (500 + 500) + 2_000
    # stage 3: parameters gathered around the turn to the backward pass; at the update one sub-group's fp32 gradient
    gathered = 2 * (1_200 + 100)
    assert most(50_000, stage=3) == 50_000 + gathered + 2 * (500 + 500)
    assert most(10, stage=3) == 4 * 8_000 // 4
    assert most(10, stage=3, sub_group_size=10) == gathered + 2 * (500 + 500) + 2_000 + 4 * 1_000 // 4


# --- traffic and operations


def test_weights_in_four_bits_and_moments_in_eight():
    config = tiny_config("llama3")
    plain, _ = read_shape(config, lora_rank=4)
    packed, _ = read_shape(config, lora_rank=4, four_bits=True)
    linear = sum(p.numel() for n, p in build(config, torch.float32).named_parameters() if "_proj" in n)
    assert packed.packed == linear
    # QLoRA, arXiv:2305.14314, section 3: the scales of blocks of 64 and 256 add 8/64 + 32/(64 * 256) = 0.127 bits
    assert round(memory.FOUR_BIT_BYTES * 8, 3) == 4.127
    wide, narrow = (memory.states(p, Zero(stage=1), 1) for p in (plain, packed))
    assert wide.weights - narrow.weights == pytest.approx((2 - memory.FOUR_BIT_BYTES) * linear, abs=1)
    assert (wide.gradients, wide.optimizer) == (narrow.gradients, narrow.optimizer)
    eight = memory.states(plain, read_zero("zero2", Workload(optimizer="adamw-8bit"), 2), 2)
    assert eight.optimizer == pytest.approx((4 + 2 + 2 * 4 / 256) * plain.trainable / 2, abs=2)


def test_presets_that_do_not_go_with_four_and_eight_bits_are_left_out():
    lora = by_preset(estimate(LLAMA3_8B, Workload(lora_rank=16, quantize="4bit")))
    assert list(lora) == ["zero1", "zero2", "zero2-offload"]
    assert lora["zero1"].memory.weights < 5 * GIB  # 7.0 of 7.5 billion weights at half a byte
    assert " --lora-rank 16 --quantize 4bit " in lora["zero1"].command
    eight = by_preset(estimate(LLAMA3_8B, Workload(optimizer="adamw-8bit"), hardware=read_hardware(8, "h100")))
    assert list(eight) == ["zero1", "zero2"]
    assert " --optimizer adamw-8bit " in eight["zero1"].command
    assert (
        estimate(LLAMA3_8B, Workload(lora_rank=16, quantize="4bit"), hardware=read_hardware(gpu_memory=1))[0].fits
        is False
    )
    with pytest.raises(ConfigError, match="--quantize 4bit with --deepspeed zero3: ZeRO-3 cuts weights into pieces"):
        estimate(LLAMA3_8B, Workload(lora_rank=16, quantize="4bit"), deepspeed="zero3")
    with pytest.raises(ConfigError, match="--quantize 4bit needs --lora-rank N"):
        estimate(LLAMA3_8B, Workload(quantize="4bit"))
    with pytest.raises(
        ConfigError, match=r"train\.optimizer = 'sgd': expected one of adamw, adamw-8bit, adamw-8bit-paged"
    ):
        estimate(LLAMA3_8B, Workload(optimizer="sgd"))


def test_communication_of_each_stage():
    parameters = Parameters(0, 1_000, 0, 0, 0, 10, 0)
    ring = 3 / 4

    def sent(micro_batches: int = 5, **settings: Any) -> float:
        return memory.communication(parameters, Zero(**settings), 4, micro_batches)

    # all-reduce of bf16 gradients once, all-gather of bf16 weights once
    assert sent(stage=1) == sent(stage=1, micro_batches=1) == ring * (4_000 + 2_000)
    # an all-reduce per micro-batch
    assert sent(stage=2) == ring * (5 * 4_000 + 2_000)
    assert sent(stage=2, multi_rank_allreduce=False) == ring * (5 * 2_000 + 2_000)
    # two all-gathers and a reduce-scatter per micro-batch
    assert sent(stage=3) == ring * 5 * 6_000
    assert sent(stage=1, communication_bytes=4) == ring * (8_000 + 2_000)
    assert memory.communication(parameters, Zero(stage=3), 1, 5) == 0


def test_operations_are_six_per_weight_and_attention():
    parameters, shape = read_shape(tiny_config("mistral"))
    assert shape_module.flops_per_token(parameters, shape, 0) == 6 * parameters.layers
    with_attention = shape_module.flops_per_token(parameters, shape, 100)
    assert (
        with_attention - 6 * parameters.layers == 2 * 6 * 4 * 8 * 9
    )  # layers, heads, head_dim; the window of 9 caps it
    adapted = dataclasses.replace(parameters, adapters=1_000)
    assert shape_module.flops_per_token(adapted, shape, 0) == 4 * parameters.layers + 6_000


# --- known machines


def by_preset(estimates: list[Estimate]) -> dict[str, Estimate]:
    return {e.preset: e for e in estimates}


@pytest.mark.parametrize("tokens_per_batch", [4096, 8192])
def test_gemma_7b_at_4096_tokens_fits_four_48_gb_gpus_with_zero3_and_checkpointing(tokens_per_batch):
    hardware = read_hardware(gpus=4, gpu_memory=48)
    found = estimate(GEMMA_7B, Workload(max_length=4096, tokens_per_batch=tokens_per_batch), hardware)
    plans = by_preset(found)
    assert plans["zero3"].fits
    assert plans["zero3"].kept == "inputs"
    assert not plans["zero1"].fits
    assert [e.preset for e in found if e.recommended] == ["zero3"]
    without = estimate(GEMMA_7B, Workload(max_length=4096), hardware, "zero3", kept="all")
    assert not without[0].fits


def test_llama3_8b_does_not_fit_one_80_gb_gpu_with_zero1_but_adapters_do():
    hardware = read_hardware(gpu="h100")
    plans = by_preset(estimate(LLAMA3_8B, Workload(max_length=4096), hardware))
    assert not plans["zero1"].fits
    assert plans["zero1"].memory.total > 120 * GIB
    adapted = by_preset(estimate(LLAMA3_8B, Workload(max_length=4096, lora_rank=16), hardware))
    assert adapted["zero1"].fits


def test_2b_fits_one_141_gb_gpu():
    (plan,) = estimate(GEMMA_2B, Workload(max_length=4096), read_hardware(gpu_memory=141), "zero1")
    assert plan.fits
    assert plan.recommended


def test_the_parts_add_up_to_the_peak_and_offload_moves_bytes_to_the_cpu():
    plans = by_preset(estimate(GEMMA_2B, kept="inputs"))
    for plan in plans.values():
        m = plan.memory
        assert m.total == m.weights + m.gradients + m.optimizer + m.activations + m.buffers
        assert min(dataclasses.astuple(m)) >= 0
    assert plans["zero2-offload"].memory.host > 16 * plans["zero2"].parameters.total
    assert plans["zero2-offload"].memory.total < plans["zero2"].memory.total
    assert plans["zero3-offload"].memory.total < plans["zero3"].memory.total


# --- hardware, utilisation, output


def test_hardware_by_name_and_by_memory():
    assert read_hardware(2, "NVIDIA H200") == read_hardware(2, "h200")
    assert read_hardware(1, "l40s").tflops == 362
    assert read_hardware(1, None, 48).tflops is None
    assert read_hardware(1, "a100", 40).memory < read_hardware(1, "a100").memory
    with pytest.raises(ConfigError, match=r"--gpu 'h10': expected one of h100, .* or --gpu-memory GB\. Did you mean"):
        read_hardware(1, "h10")
    with pytest.raises(ConfigError, match=r"--gpus 0 --gpu-memory None: expected numbers above 0"):
        read_hardware(0)


def test_utilisation_is_assumed_and_says_so():
    (plan,) = estimate(LLAMA3_8B, hardware=read_hardware(1, "h200"), deepspeed="zero1")
    assert plan.workload.mfu == ASSUMED_MFU
    assert "assumed 40 % MFU without recomputation" in plan.workload.mfu_source


def test_a_pair_is_no_longer_than_two_conversations_and_no_size_is_nothing():
    assert Workload(max_length=128).pair_tokens == 256
    assert Workload(max_length=4096, tokens_per_pair=500).pair_tokens == 500
    with pytest.raises(ConfigError, match="--max-length 0: expected a number above 0"):
        Workload(max_length=0)


def test_data_says_how_long_its_pairs_are_and_how_much_they_share():
    shared = Sharing(pairs=1000, prompts=100, conversations=600, separate=4_000_000, once=1_000_000, keys=2_400_000)
    work = Workload.of_data(shared, pairs_per_step=128)
    assert (work.pairs, work.tokens_per_pair, work.keys_per_token, work.shared) == (1000, 250.0, 2.4, 0.75)
    assert work.pairs_per_step == 128
    assert Workload.of_data(shared, tokens_per_pair=300.0, pairs=7).pairs == 7
    plain, on_data = (estimate(LLAMA3_8B, w, deepspeed="zero3")[0] for w in (Workload(), work))
    assert on_data.memory.activations > plain.memory.activations, "more keys are gathered"
    assert "of about 250 tokens (75.0% of separate passes' are computed once)" in format_estimate([on_data])
    many = dataclasses.replace(shared, keys=10**9)
    assert Workload.of_data(many).keys_per_token == KEYS_PER_TOKEN, "rows are limited to that"


def test_hours_follow_from_operations_and_utilisation():
    hardware = read_hardware(gpus=2, gpu="h100")
    (plan,) = estimate(
        LLAMA3_8B,
        Workload(pairs=1000, tokens_per_pair=500, epochs=2, mfu=0.5, mfu_source="given"),
        hardware=hardware,
        deepspeed="zero3",
        kept="all",
    )
    flops = 500 * shape_module.flops_per_token(plan.parameters, plan.shape, 500)
    assert plan.pairs_per_second == pytest.approx(2 * 989e12 * 0.5 / flops)
    assert plan.hours == pytest.approx(2000 / plan.pairs_per_second / 3600)


def test_the_table_has_a_line_per_preset_and_a_command_that_can_be_pasted():
    found = estimate(
        GEMMA_7B,
        Workload(model="google/gemma 7b", max_length=4096, pairs_per_step=512, pairs=700_000),
        hardware=read_hardware(4, "h100"),
    )
    text = format_estimate(found)
    assert text.startswith("google/gemma 7b: 8,537,683,968 parameters = embedding 786,432,000 + 28 layers ")
    for preset in PRESETS:
        assert sum(line.startswith(preset + " ") for line in text.splitlines()) == 1
    best = next(e for e in found if e.recommended)
    assert best.command == (
        f"btrm train --model 'google/gemma 7b' --data DATA --gpus 4 --deepspeed {best.preset} --max-length 4096 "
        f"--tokens-per-batch 8192 --pairs-per-step 512 {activations.HOW[best.kept]}"
    )
    assert best.command in text
    assert f"{best.hours:.1f} hours for 700,000 pairs x 1 at assumed 40 % MFU without recomputation" in text


def test_nothing_fits_says_what_to_try():
    hardware = read_hardware(1, "4090")
    found = estimate(GEMMA_7B, Workload(max_length=2048), hardware, "zero1")
    assert not found[0].recommended
    advice = format_estimate(found).splitlines()[-1]
    assert advice.startswith("Nothing fits. Try btrm plan with: --tokens-per-batch 4096; or --deepspeed zero3 ")
    assert "on 16 such GPUs" in advice
    assert "--lora-rank 16" in advice


def test_dictionary_is_plain_and_complete():
    found = estimate(GEMMA_2B, Workload(model="g"), read_hardware(1, "h200"))
    out = json.loads(json.dumps(to_dict(found)))
    assert out["parameters"]["total"] == found[0].parameters.total
    assert [p["preset"] for p in out["presets"]] == list(PRESETS)
    assert out["presets"][0]["memory"]["total"] == found[0].memory.total
    assert sum(p["recommended"] for p in out["presets"]) == 1


def test_a_directory_with_only_a_configuration_is_enough(tmp_path):
    tiny_config("llama3").save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]
    found = estimate(str(tmp_path))
    assert found[0].workload.model == str(tmp_path)
    assert all(e.fits for e in found)
    assert found[0].recommended
    with pytest.raises(BtrmError, match="nowhere"):
        estimate(str(tmp_path / "nowhere"))
