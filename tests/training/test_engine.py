"""DeepSpeed configurations: presets, users' files, and contradictions with what btrm derives."""

import json
from typing import Any

import pytest
import torch
from support import trajectories

from btrm_core.config import read_settings
from btrm_core.errors import ConfigError
from btrm_core.training.processes.runtime import group, start
from btrm_core.training.processes.zero import LONE_BUCKET, PRESETS, deepspeed_config

RESOLVED = {"train.learning_rate": 1e-5, "train.weight_decay": 0.001}

SEED_STAGE_3 = {  # the shape of the file that users of the RLHFlow recipes have
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": True},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def made(tmp_path=None, content=None, world=2, **values):
    if content is not None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(content))
        values["distributed.deepspeed"] = str(path)
    return deepspeed_config(read_settings(None, {**RESOLVED, **values}), world)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = made(**{"distributed.deepspeed": name, "model.dtype": "bf16"})
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert config["bf16"]["enabled"]
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["bf16"]["immediate_grad_update"], "or every gradient lies in memory twice"
    assert config["optimizer"]["params"]["torch_adam"], "anything else is compiled at run time"
    assert config["optimizer"]["params"]["lr"] == 1e-5


@pytest.mark.parametrize(("name", "world", "sent"), [
    ("zero1", 1, "fp32"), ("zero1", 8, "fp32"), ("zero3", 1, "fp32"), ("zero3", 8, None), ("zero2", 8, None),
])  # fmt: skip
def test_what_was_added_up_in_fp32_is_sent_so(name, world, sent):
    values = {"distributed.deepspeed": name, "model.dtype": "bf16"}
    assert made(world=world, **values).get("communication_data_type") == sent
    assert "communication_data_type" not in made(world=world, **{**values, "model.dtype": "fp32"})


def test_deepspeed_does_not_wait_for_its_own_timer_unless_asked(tmp_path):
    assert made()["timers"]["throughput"]["enabled"] is False
    asked = {"zero_optimization": {"stage": 1}, "timers": {"throughput": {"enabled": True}}}
    asked["communication_data_type"] = "bf16"
    config = made(tmp_path, asked, **{"model.dtype": "bf16"})
    assert config["timers"]["throughput"]["enabled"] is True
    assert config["communication_data_type"] == "bf16"


def test_a_users_file_is_honoured_and_auto_is_filled(tmp_path):
    config = made(tmp_path, SEED_STAGE_3)
    assert config["zero_optimization"]["overlap_comm"] is True
    assert "auto" not in json.dumps(config)
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"]["enabled"], "with dtype auto the file decides"
    assert config["wall_clock_breakdown"] is False


def test_a_lone_process_copies_no_gradients_into_buckets_unless_asked(tmp_path):
    for name in PRESETS:
        alone = made(world=1, **{"distributed.deepspeed": name})["zero_optimization"]
        assert alone["reduce_bucket_size"] == LONE_BUCKET, name
        assert "reduce_bucket_size" not in made(world=2, **{"distributed.deepspeed": name})["zero_optimization"]
    asked = {**SEED_STAGE_3, "zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}}
    assert made(tmp_path, asked, world=1)["zero_optimization"]["reduce_bucket_size"] == 5e8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps = 8 contradicts btrm's 1"),
        ({"gradient_clipping": 0.3}, "gradient_clipping = 0.3 contradicts btrm's 1.0"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage = 0, expected 1, 2 or 3"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = True contradicts btrm's False"),
        ({"optimizer": {"type": "Lion", "params": {}}}, "optimizer.type = 'Lion' contradicts btrm's 'AdamW'"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
            "optimizer.params.lr = 0.1 contradicts btrm's 1e-05",
        ),
    ],
)
def test_contradictions_name_both_values(tmp_path, change, message):
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, {**SEED_STAGE_3, **change})
    assert message in str(caught.value)
    assert str(tmp_path / "ds.json") in str(caught.value)


def test_unknown_presets_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match=r"--deepspeed 'zero4': expected one of zero1, .* Did you mean 'zero"):
        made(**{"distributed.deepspeed": "zero4"})
    with pytest.raises(ConfigError, match="cannot read the DeepSpeed configuration"):
        made(**{"distributed.deepspeed": str(tmp_path / "none.json")})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        made(**{"distributed.deepspeed": str(tmp_path / "bad.json")})


AXOLOTL_ZERO3: dict[str, Any] = {
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 0,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": True},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.mark.parametrize("suffix", [".json", ".json5", ".conf", ""])
def test_files_as_people_have_them(tmp_path, suffix):
    path = tmp_path / f"zero3_bf16{suffix}"
    zero = dict(AXOLOTL_ZERO3["zero_optimization"])
    del zero["stage3_gather_16bit_weights_on_model_save"]
    old = {**AXOLOTL_ZERO3, "zero_optimization": {**zero, "stage3_gather_fp16_weights_on_model_save": True}}
    for given in (AXOLOTL_ZERO3, old, {**old, "data_types": {"grad_accum_dtype": None}}):
        path.write_text(json.dumps(given))
        found = made(**{"distributed.deepspeed": str(path)})
        assert found["zero_optimization"]["stage"] == 3
        assert found["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
        assert "stage3_gather_fp16_weights_on_model_save" not in found["zero_optimization"]
        assert found["data_types"] == {"grad_accum_dtype": "fp32"}
        assert "auto" not in found["zero_optimization"].values()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"zero_optimisation": {"stage": 3}},
            r"DeepSpeed knows no 'zero_optimisation'\. Did you mean 'zero_optimization'",
        ),
        ({"zero_optimization": {"stag": 3}}, r"DeepSpeed knows no 'zero_optimization\.stag'\. Did you mean 'stage'"),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage = 4, expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, r"zero_optimization\.stage = '3', expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, r"zero_optimization\.stage = True, expected 1, 2 or 3"),
        ({"zero_optimization": [3]}, r"'zero_optimization' is \[3\], expected an object"),
        ({"zero_optimization": {"mics_shard_size": 8}}, r"zero_optimization\.mics_shard_size does not go with btrm"),
        ({"amp": {"enabled": True}}, r"'amp' does not go with btrm \(btrm computes in bf16 or fp32\); leave it out"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, r"'torch_autocast' does not go with btrm"),
        ({"compile": {"deepcompile": True}}, r"'compile' does not go with btrm"),
    ],
)
def test_what_deepspeed_or_btrm_would_not_do_is_one_line(tmp_path, more, told):
    (tmp_path / "ds.json").write_text(json.dumps(more))
    with pytest.raises(ConfigError, match=told) as caught:
        made(**{"distributed.deepspeed": str(tmp_path / "ds.json")})
    assert "\n" not in str(caught.value)


OFF = {  # DeepSpeed itself refuses some of these for being there at all
    "amp": {"enabled": False},
    "compile": {"disable": True},
    "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}},
    "data_efficiency": {"enabled": False, "data_sampling": {"enabled": False}},
    "elasticity": {"enabled": False, "max_train_batch_size": 2000},
    "nebula": {"enabled": False},
    "sparse_gradients": False,
    "tensor_parallel": {"autotp_size": 0},
    "torch_autocast": {"enabled": False},
}
NOTHING = {  # null and "auto", wherever they stand
    "timers": None,
    "optimizer": None,
    "bf16": None,
    "gradient_clipping": None,
    "communication_data_type": "auto",
    "steps_per_print": "auto",
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "_comment": "how people write remarks",
}


def test_what_is_switched_off_or_left_open_is_nothing(tmp_path):
    offload = {"device": "cpu", "pin_memory": "auto"}
    zero = {"stage": 2, "mics_shard_size": -1, "zero_hpz_partition_size": 1, "offload_optimizer": offload}
    config = made(tmp_path, {**OFF, **NOTHING, "zero_optimization": zero})
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    filled = {"timers", "optimizer", "bf16", "gradient_clipping", "activation_checkpointing"}
    assert not {*OFF, *NOTHING}.intersection(config) - filled
    assert config["gradient_clipping"] == 1.0


def test_a_second_partition_of_the_weights_divides_the_processes(tmp_path):
    hpz = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    assert made(tmp_path, hpz, world=8)["zero_optimization"]["zero_hpz_partition_size"] == 4
    with pytest.raises(ConfigError, match=r"zero_hpz_partition_size = 4 with 2 process\(es\): expected a number that"):
        made(tmp_path, hpz, world=2)


def test_what_a_run_needs_is_there_whatever_the_file_says(tmp_path):
    """Without them the model could not be saved at the end, a resumed run would be rounded, and no norm reported."""
    needed = ("stage3_gather_16bit_weights_on_model_save", "load_from_fp32_weights", "compute_grad_norm")
    zero = made(tmp_path, {"zero_optimization": {"stage": 3, **dict.fromkeys(needed, False)}})["zero_optimization"]
    assert [zero[key] for key in needed] == [True, True, True]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"bf16": {"enable": True}}, "DeepSpeed knows no 'bf16.enable'. Did you mean 'enabled'?"),
        ({"bf16": True}, "'bf16' is True, expected an object"),
        ({"bf16": {"enabled": "false"}}, "bf16.enabled = 'false', expected true, false or \"auto\""),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "Did you mean 'grad_accum_dtype'?"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype = 'bf16' contradicts btrm's 'fp32'"),
        ({"flops_profiler": {"enable": True}}, "DeepSpeed knows no 'flops_profiler.enable'. Did you mean 'enabled'?"),
        ({"tensorboard": {"output_pth": ""}}, "no 'tensorboard.output_pth'. Did you mean 'output_path'?"),
        ({"timers": {"throughput": True}}, "'timers.throughput' is True, expected an object"),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, "no 'optimizer.params.learning_rate'"),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, "adam_w_mode = False contradicts btrm's True"),
        ({"communication_data_type": "float32"}, "Supported data types: ['fp16', 'bf16', 'fp32']. Got: float32"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown = 'yes', expected true or false"),
        ({"train_batch_size": 256}, "train_batch_size = 256 contradicts btrm's 16; leave it out or set it to \"auto\" "
                                    "(btrm derives it from train.pairs_per_step)"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal does not go with btrm"),
        ({"sparse_attention": {"mode": "fixed"}}, "'sparse_attention' does not go with btrm"),
        ({"deepspeed_config": {"zero_stage": 2}}, "'deepspeed_config' belongs to a configuration of accelerate"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer' is 'cpu', expected an object"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
         "DeepSpeed knows no 'zero_optimization.offload_optimizer.devise'. Did you mean 'device'?"),
        ({"zero_optimization": {"offload_param": {"device": "CPU"}}},
         "does not take zero_optimization.offload_param.device = 'CPU': Input should be 'none', 'cpu' or 'nvme'"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "zero_optimization.reduce_bucket_size = '5e8': Input"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients does not go with btrm"),
        ({"zero_optimization": {"leaf_module": ["X"]}}, "DeepSpeed does not take this configuration: leaf_module"),
    ],
)  # fmt: skip
def test_mistakes_at_every_level_are_one_line_before_anything_is_loaded(tmp_path, more, told):
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, more, **{"train.pairs_per_step": 16})
    assert told in str(caught.value)
    assert str(tmp_path / "ds.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ('\ufeff{"zero_optimization": {"stage": 2}}', 2),
        ('// mine\n{"zero_optimization": {"stage": 3,}, /* later */ "bf16": {"enabled": "auto"},}', 3),
    ],
)
def test_files_that_deepspeed_reads(tmp_path, text, stage):
    (tmp_path / "ds.json").write_text(text)
    assert made(**{"distributed.deepspeed": str(tmp_path / "ds.json")})["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"zero_optimization:\n  stage: 2\n",
        b'{"bf16": {"enabled": true}, "bf16": {}}',
        '{"seed": 1}'.encode("utf-16"),
    ],
)
def test_what_is_no_configuration_is_one_line(tmp_path, content):
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"DeepSpeed configuration .*ds\.json(: it is no UTF-8| is not valid JSON)"):
        made(**{"distributed.deepspeed": str(tmp_path / "ds.json")})


def test_what_deepspeed_refuses_at_its_start_is_one_line(tmp_path):
    """Here: a ratio that needs an optimizer of DeepSpeed's own; elsewhere a disk or a login that is missing."""
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(
        ConfigError, match=r"DeepSpeed does not start with .*ds\.json: .*Adam.*; change the file, or use"
    ):
        trajectories.train(
            trajectories.prepare(tmp_path, 8), tmp_path / "out", distributed__deepspeed=str(tmp_path / "ds.json")
        )


def test_a_process_alone_is_a_world_of_one_without_a_port():
    config = read_settings(None, RESOLVED)
    with group(config), start(config) as runtime:
        assert (runtime.rank, runtime.world, runtime.zero_stage) == (0, 1, 1)
        assert runtime.any(True)
        assert not runtime.any(False)
        assert runtime.sum(torch.ones(2)).tolist() == [1.0, 1.0]
