#!/usr/bin/env python3
"""Make the small random checkpoints in this folder, with the outputs transformers gives for them.

    python generate.py [--out DIR] [--only NAME ...] [--check]

Each fixture is one flat folder:

    config.json           a configuration as the published checkpoints of that family write it
                          (a v5-style one where the fixture is about that)
    model.safetensors     every weight, norm and bias random (or model-*.safetensors with an index)
    golden.safetensors    input_ids  int64 [2, 24]
                          hidden.0   f32 [2, 24, hidden]  the embeddings
                          hidden.l   f32                  after layer l; the last one after the final norm
                          logits     f32 [2, 24, vocabulary]

Where there is padding, attention_mask int64 (0 = padding) says so; what stands at padding means nothing.
Where the rotation follows the length of a text, decoded_logits f32 [2, 24, vocabulary] are those of 6 tokens and then
token by token, with a cache.

For a model with an encoder, input_ids and attention_mask (int64, 0 = padding) are the encoder's, decoder_input_ids
int64 [2, 17] the decoder's, and logits are f32 [2, 17, vocabulary]; hidden.l are the encoder's embeddings and layers,
and decoder.hidden.l the decoder's, the last of each after its final norm.  limited_logits f32 [2, 17, vocabulary]
are the logits where an expert takes 4 tokens of a sequence, as transformers 4 counts them.  generated int64 [1, 13] is what greedy
decoding gives behind the first window, from the start token on.

The outputs come from the folder as written (not from the model in memory), in float32 with eager
attention; weights stored in bfloat16 or packed are widened first.  Every tensor is drawn from its own generator,
seeded with the fixture's name, a retry number and the tensor's name, so the weights do not depend on the
order in which a library happens to list its parameters.  A draw in which a router decides by less than
2e-5 is thrown away and the next retry number taken, so that rounding cannot change which experts run.

The committed files were made with transformers 5.17.0 (5.24.0 for families that this lacks), torch 2.15.0 (CPU), numpy 2.4.6 and safetensors
0.8.0.  The same versions give the same bytes; other versions may differ in the last bits of the golden
outputs.  `--check` compares the committed outputs with the installed transformers and writes nothing.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors
from transformers.models.deepseek_v2 import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

MADE_WITH = "5.17.0"
CLOSEST_CALL = 2e-5  # least difference between the last expert taken and the first one left out

# ------------------------------------------------------------------------------------- configurations

COMMON = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MIXTRAL = COMMON | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "intermediate_size": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
}

QWEN2_MOE = COMMON | {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "max_window_layers": 21,
    "use_sliding_window": False,
}

QWEN3_MOE = COMMON | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 12,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "max_window_layers": 48,
    "use_sliding_window": False,
    "attention_bias": False,
}

# Like the published OLMoE: no rms_norm_eps, and intermediate_size is the width of one expert.
OLMOE = COMMON | {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "num_key_value_heads": 4,
    "intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "clip_qkv": 1.0,
    "attention_bias": False,
    "pad_token_id": 1,
}

# As published; heads share keys all the same.
DEEPSEEK = COMMON | {
    "model_type": "deepseek",
    "torch_dtype": "bfloat16",
    "architectures": ["DeepseekForCausalLM"],
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": None,
    "attention_bias": False,
    "pretraining_tp": 1,
}

# Ling, as published, and Ling 2.0, whose projections have biases here.
BAILING_MOE = COMMON | {
    "model_type": "bailing_moe",
    "torch_dtype": "bfloat16",
    "architectures": ["BailingMoeForCausalLM"],
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "num_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
    "norm_head": False,
    "norm_softmax": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "multi_gate": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 600000,
    "rope_scaling": None,
}

BAILING_MOE_V2 = BAILING_MOE | {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "head_dim": 12,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "use_qk_norm": True,
    "use_qkv_bias": True,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 6,
    "num_nextn_predict_layers": 1,
}

# Ling 2.0 in all but a few keys.
SARVAM_MOE = {
    key: value
    for key, value in BAILING_MOE_V2.items()
    if key not in ("partial_rotary_factor", "rotary_dim", "norm_head", "norm_softmax", "multi_gate")
} | {
    "model_type": "sarvam_moe",
    "architectures": ["SarvamMoEForCausalLM"],
    "rope_theta": 8000000.0,
    "num_nextn_predict_layers": 0,
}

# Groups, q_lora, a scale other than 1, mscale != mscale_all_dim, and an rms_norm_eps far enough from the
# 1e-6 that the two latent norms always use to show in the logits.
DEEPSEEK_V2 = COMMON | {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rms_norm_eps": 1e-03,
    "rope_theta": 10000,
    "attention_bias": False,
    "topk_method": "group_limited_greedy",
    "n_group": 3,
    "topk_group": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 4.0,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
}

DEEPSEEK_V2_LITE = DEEPSEEK_V2 | {
    "torch_dtype": "bfloat16",
    "n_routed_experts": 8,
    "q_lora_rank": None,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": DEEPSEEK_V2["rope_scaling"] | {"mscale": 0.707},
}

# Groups scored by two experts each, a bias that only choices see, q_lora, and a scale other than 1.
DEEPSEEK_V3 = DEEPSEEK_V2 | {
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "rope_scaling": DEEPSEEK_V2["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
}

# Keys and the name of YaRN as published.
SARVAM_MLA = {
    key: value
    for key, value in DEEPSEEK_V3.items()
    if key not in ("n_routed_experts", "n_shared_experts", "scoring_func", "topk_method", "num_nextn_predict_layers")
} | {
    "model_type": "sarvam_mla",
    "architectures": ["SarvamMLAForCausalLM"],
    "head_dim": 24,
    "q_head_dim": 20,
    "q_lora_rank": None,
    "n_group": 1,
    "num_experts": 6,
    "num_shared_experts": 2,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"type": "deepseek_yarn"},
}

GLM4_MOE = COMMON | {
    "model_type": "glm4_moe",
    "torch_dtype": "bfloat16",
    "architectures": ["Glm4MoeForCausalLM"],
    "head_dim": 12,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 5,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "use_qk_norm": True,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-05,
    "num_nextn_predict_layers": 1,
}

GPT_OSS = COMMON | {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "torch_dtype": "bfloat16",
    "head_dim": 12,
    "intermediate_size": 32,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "swiglu_limit": 7.0,
    "initial_context_length": 16,
    "rms_norm_eps": 1e-05,
    "rope_theta": 150000,
    "sliding_window": 8,
    "attention_bias": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}

# Windows are longer than the original length, so the long magnitude counts; the long factors never do.
PHIMOE = COMMON | {
    "model_type": "phimoe",
    "torch_dtype": "bfloat16",
    "architectures": ["PhiMoEForCausalLM"],
    "intermediate_size": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.1,
    "input_jitter_noise": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "attention_bias": True,
    "lm_head_bias": True,
    "sliding_window": 511,
    "original_max_position_embeddings": 16,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "short_mscale": 1.1,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 16,
    },
}

# Its scoring_func is what the published config says; transformers does not read it.
DOTS1 = COMMON | {
    "model_type": "dots1",
    "torch_dtype": "bfloat16",
    "architectures": ["Dots1ForCausalLM"],
    "head_dim": 12,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 3,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "noaux_tc",
    "attention_bias": False,
    "sliding_window": 8,
    "max_window_layers": 1,
    "rope_theta": 10000000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-05,
}

ERNIE4_5_MOE = COMMON | {
    "model_type": "ernie4_5_moe",
    "torch_dtype": "bfloat16",
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "tie_word_embeddings": True,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "moe_num_experts": 5,
    "moe_k": 2,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "use_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
}

# As transformers writes it; as first published, all keys are side by side.
ERNIE4_5_VL_MOE = {
    "model_type": "ernie4_5_vl_moe",
    "torch_dtype": "bfloat16",
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "image_token_id": 60,
    "video_token_id": 61,
    "image_start_token_id": 62,
    "image_end_token_id": 63,
    "tie_word_embeddings": True,
    "text_config": {
        key: value
        for key, value in ERNIE4_5_MOE.items()
        if key not in ("architectures", "rope_theta") and not key.startswith("moe_layer")
    }
    | {
        "model_type": "ernie4_5_vl_moe_text",
        "head_dim": 12,
        "moe_intermediate_size": [16, 12],
        "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [2, 2, 2]},
    },
    "vision_config": {
        "model_type": "ernie4_5_vl_moe_vision",
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "in_channels": 1,
        "patch_size": 2,
        "spatial_merge_size": 1,
        "temporal_merge_size": 2,
    },
}

# Layer 0 attends within chunks and rotates, layer 1 does neither and has growing scores.
LLAMA4_TEXT = COMMON | {
    "model_type": "llama4_text",
    "torch_dtype": "bfloat16",
    "architectures": ["Llama4ForCausalLM"],
    "head_dim": 12,
    "intermediate_size": 16,
    "intermediate_size_mlp": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "attention_chunk_size": 8,
    "no_rope_layer_interval": 2,
    "attn_temperature_tuning": True,
    "floor_scale": 8,
    "attn_scale": 0.3,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

# Layers of both kinds, dense and with experts; two value heads on each key head, whose widths differ.
QWEN3_NEXT = COMMON | {
    "model_type": "qwen3_next",
    "torch_dtype": "bfloat16",
    "architectures": ["Qwen3NextForCausalLM"],
    "num_hidden_layers": 4,
    "head_dim": 12,
    "partial_rotary_factor": 0.5,
    "full_attention_interval": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [2],
    "attention_bias": False,
    "rope_theta": 10000000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-06,
}

# The language model of Qwen3.5, with the rotary section that models of text and images have.
QWEN3_5_MOE_TEXT = COMMON | {
    "model_type": "qwen3_5_moe_text",
    "num_hidden_layers": 3,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "full_attention_interval": 2,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mtp_num_hidden_layers": 1,
    "attention_bias": False,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    },
}

VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 2,
    "in_channels": 1,
    "patch_size": 2,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
}

QWEN3_5_MOE = {
    "model_type": "qwen3_5_moe",
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "tie_word_embeddings": False,
    "text_config": QWEN3_5_MOE_TEXT,
    "vision_config": {"model_type": "qwen3_5_moe"} | VISION | {"out_hidden_size": 32, "num_position_embeddings": 4},
}

LFM2_MOE = {k: v for k, v in COMMON.items() if k not in ("hidden_act", "attention_dropout")} | {
    "model_type": "lfm2_moe",
    "torch_dtype": "bfloat16",
    "architectures": ["Lfm2MoeForCausalLM"],
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "conv_L_cache": 3,
    "conv_bias": False,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_dense_layers": 1,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "use_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}

# Every factor away from 1, and published names for experts that are stored together.
GRANITEMOE = COMMON | {
    "model_type": "granitemoe",
    "torch_dtype": "bfloat16",
    "architectures": ["GraniteMoeForCausalLM"],
    "intermediate_size": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "attention_bias": False,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.22,
    "logits_scaling": 0.75,
    "tie_word_embeddings": True,
}

GRANITEMOESHARED = GRANITEMOE | {
    "model_type": "granitemoeshared",
    "architectures": ["GraniteMoeSharedForCausalLM"],
    "shared_intermediate_size": 24,
    "tie_word_embeddings": False,
}

# A layer without positions, and layers with a window and a base of their own.
GRANITEMOE_SWA = GRANITEMOESHARED | {
    "model_type": "granitemoe_swa",
    "architectures": ["GraniteMoeSWAForCausalLM"],
    "num_hidden_layers": 3,
    "num_local_experts": 4,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "layer_rope_theta": [0, 10000.0, 500000.0],
    "sliding_window": 8,
}

# All layers attend, and without positions.
GRANITEMOEHYBRID = GRANITEMOESHARED | {
    "model_type": "granitemoehybrid",
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "layer_types": ["attention", "attention"],
    "position_embedding_type": "nope",
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
}

# Chunks are shorter than windows; in the other fixture steps have limits.
GRANITEMOEHYBRID_MAMBA = GRANITEMOESHARED | {
    "model_type": "granitemoehybrid",
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "position_embedding_type": "nope",
    "num_local_experts": 4,
    "mamba_chunk_size": 16,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 12,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 8,
    "mamba_proj_bias": False,
}

# Both kinds of layers with and without experts.
JAMBA = COMMON | {
    "model_type": "jamba",
    "torch_dtype": "bfloat16",
    "architectures": ["JambaForCausalLM"],
    "num_hidden_layers": 4,
    "attn_layer_offset": 1,
    "attn_layer_period": 3,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "intermediate_size": 16,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 6,
    "mamba_dt_rank": 5,
    "mamba_expand": 2,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_logits_to_keep": 1,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "rms_norm_eps": 1e-06,
    "sliding_window": None,
    "use_mamba_kernels": True,
}

# A layer of every kind, each of which is one half of what others call a layer; the published keys.
NEMOTRON_H = {k: v for k, v in COMMON.items() if k not in ("hidden_act", "num_hidden_layers")} | {
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "architectures": ["NemotronHForCausalLM"],
    "num_hidden_layers": 5,
    "hybrid_override_pattern": "MEM*-",
    "head_dim": 12,
    "attention_bias": False,
    "sliding_window": None,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "n_groups": 3,
    "ssm_state_size": 10,
    "conv_kernel": 4,
    "expand": 2,
    "chunk_size": 16,
    "use_conv_bias": True,
    "use_bias": False,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, 1e30],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "intermediate_size": 24,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 20,
    "n_routed_experts": 5,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "layer_norm_epsilon": 1e-05,
    "residual_in_fp32": False,
    "rescale_prenorm_residual": True,
}

MINIMAX_M2 = COMMON | {
    "model_type": "minimax_m2",
    "torch_dtype": "bfloat16",
    "architectures": ["MiniMaxM2ForCausalLM"],
    "head_dim": 12,
    "intermediate_size": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "partial_rotary_factor": 0.5,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "num_mtp_modules": 1,
    "shared_intermediate_size": 0,
    "sliding_window": None,
}

GLM4_MOE_LITE = DEEPSEEK_V3 | {
    "model_type": "glm4_moe_lite",
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "partial_rotary_factor": 1.0,
    "mlp_layer_types": ["dense", "sparse"],
    "rope_theta": 1000000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-03,
    "num_nextn_predict_layers": 1,
}

# The indexer takes more tokens than there are.
DEEPSEEK_V32 = DEEPSEEK_V3 | {
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_topk": 32,
    "index_head_dim": 12,
    "index_n_heads": 2,
}

GLM_MOE_DSA = GLM4_MOE_LITE | {
    "model_type": "glm_moe_dsa",
    "architectures": ["GlmMoeDsaForCausalLM"],
    "index_topk": 32,
    "index_head_dim": 12,
    "index_n_heads": 2,
    "indexer_types": ["full", "shared"],
    "num_nextn_predict_layers": 0,
}

AXK1 = DEEPSEEK_V3 | {
    "model_type": "axk1",
    "architectures": ["AXK1ForCausalLM"],
    "num_nextn_predict_layers": 0,
}

# Windows are longer than the first training's, so that scores grow.
MISTRAL4 = DEEPSEEK_V3 | {
    "model_type": "mistral4",
    "architectures": ["Mistral4ForCausalLM"],
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "rope_scaling": None,
    "rope_parameters": {
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 8,
        "max_position_embeddings": 640,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.3,
        "partial_rotary_factor": 0.4,
    },
}

MISTRAL3 = {
    "model_type": "mistral3",
    "torch_dtype": "bfloat16",
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 60,
    "tie_word_embeddings": False,
    "text_config": {k: v for k, v in MISTRAL4.items() if k not in ("architectures", "tie_word_embeddings")},
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 4,
        "num_channels": 1,
        "patch_size": 2,
        "image_size": 4,
    },
}

# Lists with a number for every layer, and a base stretched by alpha, as published.
HUNYUAN_V1_MOE = COMMON | {
    "model_type": "hunyuan_v1_moe",
    "torch_dtype": "bfloat16",
    "architectures": ["HunYuanMoEV1ForCausalLM"],
    "head_dim": 12,
    "intermediate_size": 16,
    "moe_intermediate_size": [16, 16],
    "num_experts": 5,
    "num_shared_expert": [1, 1],
    "moe_topk": [2, 2],
    "norm_topk_prob": True,
    "use_qk_norm": True,
    "use_mixed_mlp_moe": True,
    "use_cla": False,
    "moe_layer_num_skipped": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    "attention_bias": False,
    "tie_word_embeddings": True,
}

FLEX_OLMO = COMMON | {
    "model_type": "flex_olmo",
    "torch_dtype": "bfloat16",
    "architectures": ["FlexOlmoForCausalLM"],
    "intermediate_size": 16,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "rope_theta": 500000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-06,
    "attention_bias": False,
    "pad_token_id": 3,
}

# A dense layer with a window and a layer with experts and without positions.
AFMOE = COMMON | {
    "model_type": "afmoe",
    "torch_dtype": "bfloat16",
    "architectures": ["AfmoeForCausalLM"],
    "head_dim": 12,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_dense_layers": 1,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "route_scale": 2.5,
    "route_norm": True,
    "score_func": "sigmoid",
    "n_group": 1,
    "topk_group": 1,
    "global_attn_every_n_layers": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "mup_enabled": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,
    "rope_scaling": None,
}

SOLAR_OPEN = GLM4_MOE | {
    "model_type": "solar_open",
    "architectures": ["SolarOpenForCausalLM"],
    "first_k_dense_replace": 0,
    "use_qk_norm": False,
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
    "num_nextn_predict_layers": 0,
}

EXAONE_MOE = COMMON | {
    "model_type": "exaone_moe",
    "torch_dtype": "bfloat16",
    "architectures": ["ExaoneMoEForCausalLM"],
    "head_dim": 12,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "layer_types": ["sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "sliding_window": 8,
    "sliding_window_pattern": "LG",
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000,
    "rope_scaling": None,
}

HY_V3 = COMMON | {
    "model_type": "hy_v3",
    "torch_dtype": "bfloat16",
    "architectures": ["HYV3ForCausalLM"],
    "head_dim": 12,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "router_scaling_factor": 2.826,
    "qk_norm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 11158840.0,
    "rope_scaling": None,
}

# The keys of the published config, which mean what transformers' own do.
MIMO_V2_FLASH = COMMON | {
    "model_type": "mimo_v2_flash",
    "torch_dtype": "bfloat16",
    "architectures": ["MiMoV2FlashForCausalLM"],
    "num_key_value_heads": 1,
    "head_dim": 12,
    "v_head_dim": 10,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 12,
    "swa_v_head_dim": 10,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 6,
    "n_shared_experts": None,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": None,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hybrid_layer_pattern": [0, 1],
    "moe_layer_freq": [0, 1],
    "sliding_window": 8,
    "attention_value_scale": 0.707,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "attention_bias": False,
    "partial_rotary_factor": 0.334,
    "rope_theta": 5000000,
    "swa_rope_theta": 10000,
    "layernorm_epsilon": 1e-05,
}

# A rotation for each kind of attention.
MELLUM = QWEN3_MOE | {
    "model_type": "mellum",
    "torch_dtype": "bfloat16",
    "architectures": ["MellumForCausalLM"],
    "layer_types": ["sliding_attention", "full_attention"],
    "mlp_layer_types": ["sparse", "sparse"],
    "sliding_window": 8,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 500000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
for key in ("rope_theta", "rope_scaling", "use_sliding_window", "decoder_sparse_step", "mlp_only_layers"):
    del MELLUM[key]

QWEN3_VL_MOE = {
    "model_type": "qwen3_vl_moe",
    "torch_dtype": "bfloat16",
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
    "tie_word_embeddings": False,
    "text_config": {key: value for key, value in QWEN3_MOE.items() if key not in ("architectures", "tie_word_embeddings")}
    | {
        "model_type": "qwen3_vl_moe_text",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "rope_theta": 5000000,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 2, 2]},
    },
    "vision_config": VISION
    | {
        "model_type": "qwen3_vl_moe",
        "out_hidden_size": 32,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [0],
    },
}

# The thinker alone, as models are published that do not speak.
QWEN3_OMNI_MOE = {
    "model_type": "qwen3_omni_moe",
    "torch_dtype": "bfloat16",
    "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
    "enable_audio_output": False,
    "thinker_config": {
        "model_type": "qwen3_omni_moe_thinker",
        "audio_token_id": 59,
        "image_token_id": 60,
        "video_token_id": 61,
        "text_config": {key: value for key, value in QWEN3_MOE.items() if key != "architectures"}
        | {
            "model_type": "qwen3_omni_moe_text",
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "rope_scaling": {
                "interleaved": True,
                "mrope_interleaved": True,
                "mrope_section": [2, 2, 2],
                "rope_type": "default",
                "type": "default",
            },
            "shared_expert_intermediate_size": 0,
        },
        "vision_config": VISION
        | {
            "model_type": "qwen3_omni_moe_vision_encoder",
            "out_hidden_size": 32,
            "num_position_embeddings": 4,
            "deepstack_visual_indexes": [0],
        },
        "audio_config": {
            "model_type": "qwen3_omni_moe_audio_encoder",
            "d_model": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 8,
            "num_mel_bins": 8,
            "downsample_hidden_size": 2,
            "output_dim": 32,
            "max_source_positions": 8,
        },
    },
}

GLM4V_MOE = {
    "model_type": "glm4v_moe",
    "torch_dtype": "bfloat16",
    "architectures": ["Glm4vMoeForConditionalGeneration"],
    "image_token_id": 60,
    "video_token_id": 61,
    "image_start_token_id": 62,
    "image_end_token_id": 63,
    "tie_word_embeddings": False,
    "text_config": {key: value for key, value in GLM4_MOE.items() if key not in ("architectures", "tie_word_embeddings")}
    | {
        "model_type": "glm4v_moe_text",
        "use_qk_norm": False,
        "num_nextn_predict_layers": 0,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 1]},
    },
    "vision_config": VISION | {"model_type": "glm4v_moe", "out_hidden_size": 32, "image_size": 4},
}

# Layers of both kinds, which differ in number of heads and rotation, dense and with experts.
LAGUNA = COMMON | {
    "model_type": "laguna",
    "torch_dtype": "bfloat16",
    "architectures": ["LagunaForCausalLM"],
    "num_hidden_layers": 3,
    "num_attention_heads_per_layer": [4, 6, 4],
    "head_dim": 12,
    "attention_bias": False,
    "gating": True,
    "intermediate_size": 24,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "moe_apply_router_weight_on_input": False,
    "moe_intermediate_size": 12,
    "moe_routed_scaling_factor": 2.5,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.5,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    },
    "sliding_window": 8,
}

# intermediate_size is the width of one expert.
ARIA = {
    "model_type": "aria",
    "torch_dtype": "bfloat16",
    "architectures": ["AriaForConditionalGeneration"],
    "image_token_index": 60,
    "projector_patch_to_query_dict": {"4": 2},
    "tie_word_embeddings": False,
    "text_config": {k: v for k, v in COMMON.items() if k not in ("torch_dtype", "tie_word_embeddings")}
    | {
        "model_type": "aria_text",
        "intermediate_size": 12,
        "moe_num_experts": 5,
        "moe_num_shared_experts": 2,
        "moe_topk": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000,
    },
    "vision_config": {
        "model_type": "idefics3_vision",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_channels": 1,
        "patch_size": 2,
        "image_size": 4,
    },
}

# Layers of both kinds, whose heads differ in width and number, and keys that are values. No token stands for an image.
GEMMA4_TEXT = {k: v for k, v in COMMON.items() if k not in ("hidden_act", "tie_word_embeddings")} | {
    "model_type": "gemma4_text",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 3,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "use_bidirectional_attention": "vision",
    "enable_moe_block": True,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_experts": 5,
    "top_k_experts": 2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "final_logit_softcapping": 4.0,
    "rms_norm_eps": 1e-06,
    "pad_token_id": 0,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}

GEMMA4 = {
    "model_type": "gemma4",
    "torch_dtype": "bfloat16",
    "architectures": ["Gemma4ForConditionalGeneration"],
    "tie_word_embeddings": True,
    "audio_config": None,
    "text_config": GEMMA4_TEXT,
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "patch_size": 2,
        "pooling_kernel_size": 1,
        "position_embedding_size": 4,
    },
}

# A dense layer that rotates although it attends to everything, and layers with experts of both kinds.
COHERE2_MOE = COMMON | {
    "model_type": "cohere2_moe",
    "torch_dtype": "bfloat16",
    "architectures": ["Cohere2MoeForCausalLM"],
    "num_hidden_layers": 3,
    "head_dim": 12,
    "intermediate_size": 12,
    "prefix_dense_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "prefix_dense_sliding_window_pattern": 1,
    "sliding_window_pattern": 2,
    "sliding_window": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_shared_experts": 2,
    "shared_expert_combination_strategy": "average",
    "expert_selection_fn": "sigmoid",
    "norm_topk_prob": True,
    "attention_bias": False,
    "layer_norm_eps": 1e-05,
    "logit_scale": 2.0,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}

# The base of the rotation is where the published config has it.
DBRX = {
    "model_type": "dbrx",
    "torch_dtype": "bfloat16",
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 1.5, "kv_n_heads": 2, "model_type": "", "rope_theta": 500000},
    "d_model": 32,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 12,
        "model_type": "",
        "moe_jitter_eps": 0.01,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 5,
        "moe_top_k": 2,
    },
    "initializer_range": 0.02,
    "max_seq_len": 512,
    "n_heads": 4,
    "n_layers": 2,
    "output_router_logits": False,
    "resid_pdrop": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 64,
}

KIMI_LINEAR = {k: v for k, v in COMMON.items() if k != "max_position_embeddings"} | {
    "model_type": "kimi_linear",
    "torch_dtype": "bfloat16",
    "architectures": ["KimiLinearForCausalLM"],
    "model_max_length": 512,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "linear_attn_config": {
        "full_attn_layers": [2],
        "kda_layers": [1, 3],
        "head_dim": 10,
        "num_heads": 3,
        "short_conv_kernel_size": 4,
    },
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "mla_use_nope": True,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "pad_token_id": 3,
    "num_expert_group": 1,
    "topk_group": 1,
    "use_grouped_topk": True,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "num_nextn_predict_layers": 0,
}

# Both stacks have layers with and without experts, and windows longer than the exact distances.
SWITCH_TRANSFORMERS = {
    "model_type": "switch_transformers",
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "torch_dtype": "float32",
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 24,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_heads": 3,
    "num_experts": 5,
    "expert_capacity": 64,
    "router_bias": False,
    "router_dtype": "float32",
    "router_jitter_noise": 0.01,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "layer_norm_epsilon": 1e-03,
    "dense_act_fn": "relu",
    "feed_forward_proj": "relu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
# Real checkpoints have blocks of 128 x 128; these do not divide the small matrices either.
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [12, 20]}

# name -> the configuration and how it is stored:
#   dtype           of the stored weights (default float32)
#   shard           largest shard, as save_pretrained's max_shard_size
#   six_digits      name shards "...-of-0000NN" with six digits, as DeepSeek's repositories do
#   fused           keep transformers 5's fused [experts, ...] tensors instead of one per expert
#   embedding       standard deviation of the embeddings (default 1, tied 0.2); small ones let rms_norm_eps show
#   written_config  keep the configuration transformers 5 writes instead of the one given here
#   length          tokens of a window (default 24)
#   padded          the first window has padding before its text, the second one behind it
#   since           the first transformers that has the family, with which its files were made (default MADE_WITH)
#   multi_token     add some tensors of a layer for multi-token prediction, or of a talker, which transformers does not load
# A configuration with a quantization_config is stored packed, as it says.
FIXTURES = {
    "mixtral": {"config": MIXTRAL},
    "mixtral_sliding_window": {"config": MIXTRAL | {"sliding_window": 8, "num_local_experts": 4}},
    "qwen2_moe": {"config": QWEN2_MOE},
    "qwen3_moe": {"config": QWEN3_MOE},
    "qwen3_moe_dynamic": {
        "config": QWEN3_MOE
        | {"max_position_embeddings": 10, "rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
        "dtype": torch.bfloat16,
    },
    "qwen3_moe_fused": {"config": QWEN3_MOE, "fused": True, "written_config": True},
    "olmoe_clip": {"config": OLMOE, "embedding": 0.02},
    "deepseek": {"config": DEEPSEEK, "dtype": torch.bfloat16},
    "bailing_moe": {"config": BAILING_MOE, "dtype": torch.bfloat16},
    "bailing_moe_v2": {"config": BAILING_MOE_V2, "dtype": torch.bfloat16, "multi_token": True},
    "deepseek_v2": {"config": DEEPSEEK_V2, "embedding": 0.02},
    "deepseek_v2_lite_sharded_bf16": {
        "config": DEEPSEEK_V2_LITE,
        "dtype": torch.bfloat16,
        "shard": "12KB",
        "six_digits": True,
    },
    "deepseek_v3": {"config": DEEPSEEK_V3, "dtype": torch.bfloat16, "embedding": 0.02, "multi_token": True},
    "deepseek_v3_fp8": {
        "config": DEEPSEEK_V3 | {"n_group": 1, "topk_group": 1, "quantization_config": FP8},
        "dtype": torch.bfloat16,
    },
    "glm4_moe": {"config": GLM4_MOE, "dtype": torch.bfloat16},
    "gpt_oss": {"config": GPT_OSS | {"num_local_experts": 4}, "dtype": torch.bfloat16},
    "gpt_oss_mxfp4": {"config": GPT_OSS | {"quantization_config": MXFP4}, "dtype": torch.bfloat16},
    "phimoe": {"config": PHIMOE, "dtype": torch.bfloat16},
    "dots1": {"config": DOTS1, "dtype": torch.bfloat16},
    "ernie4_5_moe": {"config": ERNIE4_5_MOE, "dtype": torch.bfloat16},
    "ernie4_5_vl_moe": {"config": ERNIE4_5_VL_MOE, "dtype": torch.bfloat16},
    "ernie4_5_vl_moe_fused": {
        "config": ERNIE4_5_VL_MOE
        | {"tie_word_embeddings": False}
        | {
            "text_config": ERNIE4_5_VL_MOE["text_config"]
            | {"mlp_layer_types": ["sparse", "sparse"], "moe_num_shared_experts": 0, "use_bias": True}
            | {"tie_word_embeddings": False},
        },
        "dtype": torch.bfloat16,
        "fused": True,
        "written_config": True,
    },
    "llama4_text": {"config": LLAMA4_TEXT, "dtype": torch.bfloat16},
    "qwen3_next": {"config": QWEN3_NEXT, "dtype": torch.bfloat16, "multi_token": True},
    # Longer than a chunk of 64 tokens, which transformers takes together.
    "qwen3_next_padded": {
        "config": QWEN3_NEXT
        | {"num_hidden_layers": 2, "mlp_only_layers": [], "decoder_sparse_step": 2, "norm_topk_prob": False}
        | {"linear_num_value_heads": 2, "linear_value_head_dim": 20, "linear_conv_kernel_dim": 2}
        | {"attention_bias": True, "tie_word_embeddings": True},
        "dtype": torch.bfloat16,
        "length": 70,
        "padded": True,
    },
    "qwen3_5_moe": {"config": QWEN3_5_MOE, "dtype": torch.bfloat16, "fused": True, "multi_token": True},
    "qwen3_5_moe_text": {
        "config": QWEN3_5_MOE_TEXT
        | {"architectures": ["Qwen3_5MoeForCausalLM"], "linear_num_value_heads": 6, "linear_key_head_dim": 12},
        "dtype": torch.bfloat16,
        "written_config": True,
    },
    "lfm2_moe": {"config": LFM2_MOE, "dtype": torch.bfloat16, "padded": True},
    "lfm2_moe_fused": {
        "config": LFM2_MOE
        | {"num_hidden_layers": 3, "layer_types": ["full_attention", "conv", "conv"], "num_dense_layers": 0}
        | {"conv_bias": True, "conv_L_cache": 4, "use_expert_bias": False, "norm_topk_prob": False}
        | {"routed_scaling_factor": 2.5, "tie_word_embeddings": False},
        "dtype": torch.bfloat16,
        "fused": True,
        "written_config": True,
    },
    "kimi_linear": {"config": KIMI_LINEAR, "dtype": torch.bfloat16, "padded": True},
    "kimi_linear_fused": {
        "config": KIMI_LINEAR
        | {"num_experts": 6, "num_expert_group": 3, "topk_group": 2, "num_shared_experts": 2, "moe_renormalize": False}
        | {"num_hidden_layers": 2, "first_k_dense_replace": 0}
        | {"linear_attn_config": KIMI_LINEAR["linear_attn_config"] | {"kda_layers": [1]}},
        "dtype": torch.bfloat16,
        "fused": True,
        "written_config": True,
    },
    "granitemoe": {"config": GRANITEMOE, "dtype": torch.bfloat16, "embedding": 0.1},
    "granitemoeshared": {"config": GRANITEMOESHARED, "dtype": torch.bfloat16, "embedding": 0.1},
    "granitemoeshared_fused": {
        "config": GRANITEMOESHARED,
        "dtype": torch.bfloat16,
        "embedding": 0.1,
        "fused": True,
        "written_config": True,
    },
    "granitemoe_swa": {"config": GRANITEMOE_SWA, "dtype": torch.bfloat16, "embedding": 0.1},
    "granitemoehybrid": {"config": GRANITEMOEHYBRID, "dtype": torch.bfloat16, "embedding": 0.1},
    "granitemoehybrid_mamba": {
        "config": GRANITEMOEHYBRID_MAMBA,
        "dtype": torch.bfloat16,
        "embedding": 0.1,
        "padded": True,
    },
    "granitemoehybrid_mamba_fused": {
        "config": GRANITEMOEHYBRID_MAMBA
        | {"num_hidden_layers": 2, "layer_types": ["attention", "mamba"], "position_embedding_type": "rope"}
        | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_conv": 3}
        | {"mamba_conv_bias": False, "mamba_proj_bias": True, "time_step_limit": [0.3, 1.0]},
        "dtype": torch.bfloat16,
        "embedding": 0.1,
        "fused": True,
        "written_config": True,
    },
    "jamba": {"config": JAMBA, "dtype": torch.bfloat16, "padded": True},
    "jamba_fused": {
        "config": JAMBA
        | {"num_hidden_layers": 3, "attn_layer_offset": 0, "expert_layer_offset": 0, "mamba_dt_rank": "auto"}
        | {"mamba_conv_bias": False, "mamba_d_conv": 3, "mamba_proj_bias": True, "tie_word_embeddings": True},
        "dtype": torch.bfloat16,
        "fused": True,
        "written_config": True,
    },
    "nemotron_h": {"config": NEMOTRON_H, "dtype": torch.bfloat16, "padded": True, "multi_token": True},
    "nemotron_h_fused": {
        "config": NEMOTRON_H
        | {"num_hidden_layers": 4, "hybrid_override_pattern": "E*ME", "n_routed_experts": 6, "n_group": 3, "topk_group": 2}
        | {"n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 12, "conv_kernel": 3, "time_step_min": 0.3}
        | {"use_conv_bias": False, "use_bias": True, "mlp_bias": True, "norm_topk_prob": False}
        | {"layer_norm_epsilon": 1e-03},
        "dtype": torch.bfloat16,
        "fused": True,
        "written_config": True,
    },
    "nemotron_h_latent": {
        "config": NEMOTRON_H
        | {"num_hidden_layers": 4, "hybrid_override_pattern": "E*EM", "moe_latent_size": 20, "mlp_bias": True},
        "dtype": torch.bfloat16,
    },
    "minimax_m2": {"config": MINIMAX_M2, "dtype": torch.bfloat16},
    "glm4_moe_lite": {"config": GLM4_MOE_LITE, "dtype": torch.bfloat16, "embedding": 0.02},
    "deepseek_v32": {"config": DEEPSEEK_V32 | {"num_nextn_predict_layers": 0}, "dtype": torch.bfloat16},
    "glm_moe_dsa": {"config": GLM_MOE_DSA, "dtype": torch.bfloat16},
    "axk1": {"config": AXK1, "dtype": torch.bfloat16},
    "mistral4": {"config": MISTRAL4, "dtype": torch.bfloat16},
    "mistral3": {"config": MISTRAL3, "dtype": torch.bfloat16},
    "hunyuan_v1_moe": {"config": HUNYUAN_V1_MOE, "dtype": torch.bfloat16},
    "flex_olmo": {"config": FLEX_OLMO, "dtype": torch.bfloat16},
    "afmoe": {"config": AFMOE, "dtype": torch.bfloat16, "embedding": 0.2},
    "sarvam_mla": {"config": SARVAM_MLA, "dtype": torch.bfloat16, "since": "5.24.0"},
    "sarvam_moe": {"config": SARVAM_MOE, "dtype": torch.bfloat16, "since": "5.24.0"},
    "sarvam_moe_fused": {
        "config": SARVAM_MOE
        | {"head_dim": 8, "use_qk_norm": False, "use_qkv_bias": False, "first_k_dense_replace": 0, "num_shared_experts": 2},
        "dtype": torch.bfloat16,
        "fused": True,
        "written_config": True,
        "since": "5.24.0",
    },
    "solar_open": {"config": SOLAR_OPEN, "dtype": torch.bfloat16},
    "exaone_moe": {"config": EXAONE_MOE, "dtype": torch.bfloat16},
    "hy_v3": {"config": HY_V3, "dtype": torch.bfloat16},
    "hy_v3_fused": {"config": HY_V3, "dtype": torch.bfloat16, "fused": True, "written_config": True},
    "mimo_v2_flash": {"config": MIMO_V2_FLASH, "dtype": torch.bfloat16},
    "mellum": {"config": MELLUM, "dtype": torch.bfloat16},
    "qwen3_vl_moe": {"config": QWEN3_VL_MOE, "dtype": torch.bfloat16},
    "qwen3_vl_moe_fused": {"config": QWEN3_VL_MOE, "dtype": torch.bfloat16, "fused": True, "written_config": True},
    "qwen3_omni_moe": {"config": QWEN3_OMNI_MOE, "dtype": torch.bfloat16, "multi_token": True},
    "qwen3_omni_moe_fused": {
        "config": QWEN3_OMNI_MOE,
        "dtype": torch.bfloat16,
        "fused": True,
        "written_config": True,
    },
    "glm4v_moe": {"config": GLM4V_MOE, "dtype": torch.bfloat16},
    "laguna": {"config": LAGUNA, "dtype": torch.bfloat16},
    "laguna_fused": {
        "config": {key: value for key, value in LAGUNA.items() if key not in ("rope_parameters", "mlp_layer_types")}
        | {"gating": "per-element", "attention_bias": True, "moe_routed_scaling_factor": 1.0},
        "dtype": torch.bfloat16,
        "fused": True,
        "written_config": True,
    },
    "aria": {"config": ARIA, "dtype": torch.bfloat16},
    "cohere2_moe": {"config": COHERE2_MOE, "dtype": torch.bfloat16},
    "cohere2_moe_fused": {
        "config": COHERE2_MOE
        | {"num_hidden_layers": 2, "first_k_dense_replace": 0, "num_shared_experts": 1, "rms_norm_eps": 1e-05}
        | {"shared_expert_combination_strategy": "sum", "expert_selection_fn": "softmax", "tie_word_embeddings": False},
        "dtype": torch.bfloat16,
        "fused": True,
        "written_config": True,
    },
    "dbrx": {"config": DBRX, "dtype": torch.bfloat16},
    "gemma4": {"config": GEMMA4, "dtype": torch.bfloat16},
    "gemma4_text": {
        "config": GEMMA4_TEXT
        | {"architectures": ["Gemma4ForCausalLM"], "num_hidden_layers": 2, "tie_word_embeddings": False}
        | {"layer_types": ["full_attention", "sliding_attention"], "attention_k_eq_v": False, "attention_bias": True}
        | {"final_logit_softcapping": None, "use_bidirectional_attention": None},
        "dtype": torch.bfloat16,
        "written_config": True,
    },
    "switch_transformers": {"config": SWITCH_TRANSFORMERS, "embedding": 1.0},
    "switch_transformers_untied": {
        "config": SWITCH_TRANSFORMERS
        | {"tie_word_embeddings": False, "dense_act_fn": "gelu_new", "num_decoder_layers": 3, "router_bias": True}
        | {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 3},
        "dtype": torch.bfloat16,
    },
}

# ------------------------------------------------------------------------ models that transformers lacks


class DeepseekConfig(DeepseekV2Config):
    """DeepSeekMoE, whose heads are rotated as a whole."""

    model_type = "deepseek"

    def __post_init__(self, **kwargs):
        self.qk_rope_head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class DeepseekForCausalLM(DeepseekV2ForCausalLM):
    """The layers of DeepSeek-V2 with the attention of Llama."""

    config_class = DeepseekConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = LlamaRotaryEmbedding(config)
        for l, layer in enumerate(self.model.layers):
            layer.self_attn = LlamaAttention(config, l)
            if config.norm_topk_prob and hasattr(layer.mlp, "gate"):
                # transformers passes over it.
                layer.mlp.gate.register_forward_hook(renormalised)


def renormalised(router, arguments, output):
    logits, weights, chosen = output
    return logits, weights / weights.sum(dim=-1, keepdim=True), chosen


transformers.AutoConfig.register("deepseek", DeepseekConfig)
transformers.AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("deepseek_v2"))

# How Ling calls what the models below have.
BAILING_NAMES = {
    "word_embeddings": "embed_tokens",
    "attention.dense": "self_attn.o_proj",
    "attention.query_layernorm": "self_attn.q_norm",
    "attention.key_layernorm": "self_attn.k_norm",
    "expert_bias": "e_score_correction_bias",
}


def known(config):
    """The configuration, of models that transformers lacks that of one with the same layers."""
    if config["model_type"] != "bailing_moe":
        return config
    return config | {
        "model_type": "glm4_moe" if config.get("score_function") == "sigmoid" else "deepseek",
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": config["num_shared_experts"],
        "attention_bias": config["use_qkv_bias"],
    }


def as_bailing(tensors):
    """Names of Ling, and queries, keys and values by one matrix."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in BAILING_NAMES.items():
            name = name.replace(ours, theirs)
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            renamed[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
        elif ".self_attn." not in name:
            renamed[name] = tensor
    return renamed


def from_bailing(tensors, config):
    """The reverse."""
    dim, heads, kv_heads = (config[key] for key in ("head_dim", "num_attention_heads", "num_key_value_heads"))
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in BAILING_NAMES.items():
            name = name.replace(theirs, ours)
        if ".query_key_value." in name:
            parts = tensor.split([heads * dim, kv_heads * dim, kv_heads * dim])
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), parts):
                renamed[name.replace("attention.query_key_value", f"self_attn.{part}")] = rows.contiguous()
        else:
            renamed[name] = tensor
    return renamed


# ------------------------------------------------------------------------------------------- weights


def generator(*words):
    """A random generator that depends on these words only."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def is_choice_bias(name):
    return "correction_bias" in name or name.endswith("expert_bias")


def randomise(model, words, dtype, embedding):
    """Give every parameter and correction bias random values that `dtype` can hold exactly."""
    named = list(model.named_parameters())
    # The choice-only bias of DeepSeek-V3, GLM, ERNIE and LFM2 is a buffer, and stays float32; so are Gemma's factors of layers.
    named += [(n, b) for n, b in model.named_buffers() if is_choice_bias(n) or n.endswith("layer_scalar")]
    zero_centred = model.config.model_type.startswith(("qwen3_next", "qwen3_5"))
    for name, tensor in named:
        noise = generator(*words, name).standard_normal(tuple(tensor.shape))
        kind = name.rsplit(".", 1)[-1]
        if is_choice_bias(name):
            value, keep = 0.2 * noise, torch.float32
        elif "norm" in name and kind == "weight" and tensor.dim() == 1:
            centre = 0.0 if zero_centred and "linear_attn.norm" not in name else 1.0
            value, keep = centre + 0.25 * noise, dtype
        elif kind in ("scale", "per_expert_scale", "layer_scalar"):
            value, keep = 1.0 + 0.25 * noise, dtype
        elif kind == "A_log":
            value, keep = -1.0 + noise, dtype
        elif "relative_attention_bias" in name:
            value, keep = noise, dtype
        elif "bias" in kind:
            value, keep = 0.2 * noise, dtype
        elif kind == "sinks":
            value, keep = 0.7 * noise, dtype
        elif "embed_tokens" in name or name.startswith(("shared.", "transformer.wte.")):
            value, keep = embedding * noise, dtype
        else:  # a matrix, or a stack of them: [out, in] except the input-major ones
            inputs = tensor.shape[-1]
            if tensor.dim() == 3 and model.config.model_type in ("gpt_oss", "llama4_text", "aria"):
                inputs = tensor.shape[-2]
            gain = 1.5 if tensor.shape[0] <= 16 and tensor.dim() == 2 else 1.3
            value, keep = gain / max(inputs, 1) ** 0.5 * noise, dtype
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(value).to(torch.float32).to(keep))


# -------------------------------------------------------------------------------------- packed storage


def pack_mxfp4(weight):
    """[experts, in, out] into blocks of 32 inputs: two 4-bit codes a byte, and a power of two per block."""
    values = weight.float().transpose(1, 2)
    values = values.reshape(*values.shape[:2], -1, 32)
    largest = values.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    exponent = (largest.log2().floor() - 2).clamp(-127, 127)
    codes = (values[..., None] / exponent[..., None].exp2() - torch.tensor(FP4_VALUES)).abs().argmin(-1)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks.to(torch.uint8), (exponent[..., 0] + 127).to(torch.uint8)


def block_scales(scales, shape, block):
    """One scale per element."""
    return scales.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def pack_fp8(weight, block):
    rows, cols = (-(-n // b) for n, b in zip(weight.shape, block))
    scales = torch.ones(rows, cols)
    for i in range(rows):
        for j in range(cols):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = part.float().abs().max() / 448
    return (weight.float() / block_scales(scales, weight.shape, block)).to(torch.float8_e4m3fn), scales


def pack(folder, quantization):
    """Replaces the weights that such checkpoints have packed."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if quantization["quant_method"] == "mxfp4" and name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            tensors[name + "_blocks"], tensors[name + "_scales"] = map(torch.Tensor.contiguous, pack_mxfp4(tensor))
            del tensors[name]
        elif quantization["quant_method"] == "fp8" and name.endswith(("_proj.weight", "_with_mqa.weight")):
            block = quantization["weight_block_size"]
            tensors[name], tensors[name + "_scale_inv"] = pack_fp8(tensor, block)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_multi_token(folder, name, prefix, hidden):
    """Some tensors of a layer behind the last one."""
    tensors = load_file(folder / "model.safetensors")
    for leaf, shape in {
        "enorm.weight": [hidden],
        "eh_proj.weight": [hidden, 2 * hidden],
        "mlp.experts.0.up_proj.weight": [4, hidden],
    }.items():
        noise = generator(name, prefix + leaf).standard_normal(shape)
        tensors[prefix + leaf] = torch.from_numpy(noise).to(torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def plain(folder, scratch):
    """The folder, or where transformers cannot load it as it is, a copy that it can: widened by transformers' own
    function (MXFP4) and by torch (FP8), and without the layers behind the last one."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config", None)
    if not (folder / "model.safetensors").exists():
        return folder
    tensors = load_file(folder / "model.safetensors")
    behind = [n for n in tensors if n.startswith(("talker.", f"model.layers.{config.get('num_hidden_layers')}."))]
    if not quantization and not behind and known(config) == config:
        return folder
    for name in behind:
        del tensors[name]
    for name in [n for n in tensors if n.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        blocks, scales = tensors.pop(name), tensors.pop(stem + "_scales")
        tensors[stem] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        stem = name.removesuffix("_scale_inv")
        values = tensors[stem].float()
        tensors[stem] = values * block_scales(tensors.pop(name), values.shape, quantization["weight_block_size"])
    if config["model_type"] == "bailing_moe":
        tensors = from_bailing(tensors, config)
    (scratch / "config.json").write_text(json.dumps(known(config)))
    save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    return scratch


# ------------------------------------------------------------------------------------------- outputs


class Margin:
    """Watches torch.topk (and torch.max) and keeps the smallest difference that decided a choice."""

    def __enter__(self):
        self.least, self.topk = float("inf"), torch.topk

        def watched(values, k, dim=-1, **options):
            if values.dim() == 2 and k < values.shape[-1]:
                best = self.topk(values.detach(), k + 1, dim=-1).values
                gap = best[:, k - 1] - best[:, k]
                masked = (best[:, k - 1] == 0) | ~torch.isfinite(gap)  # left-out groups: nothing to decide
                gap = gap[~masked]
                if gap.numel():
                    self.least = min(self.least, gap.min().item())
            return self.topk(values, k, dim=dim, **options)

        def watched_max(values, *arguments, **options):
            # How Switch Transformers choose; everything else that takes a maximum has no keepdim.
            if options.get("keepdim") and values.dim() == 2:
                watched(values, 1)
            return self.max(values, *arguments, **options)

        self.max, self.method = torch.max, torch.Tensor.topk
        torch.topk, torch.max, torch.Tensor.topk = watched, watched_max, watched
        return self

    def __exit__(self, *_):
        torch.topk, torch.max, torch.Tensor.topk = self.topk, self.max, self.method


def load(folder, dtype=torch.float32):
    """The model in a folder, or an error if any weight is missing, left over or of another shape."""
    with tempfile.TemporaryDirectory() as scratch:
        return load_plain(plain(folder, pathlib.Path(scratch)), dtype)


def has_encoder(config):
    return config.get("is_encoder_decoder", False)


def auto_class(folder):
    config = json.loads((folder / "config.json").read_text())
    # transformers knows Mistral 4 as a part of models of text and images alone.
    if "thinker_config" in config:
        return transformers.AutoModelForMultimodalLM
    if "vision_config" in config or config["model_type"] == "mistral4":
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForSeq2SeqLM if has_encoder(config) else transformers.AutoModelForCausalLM


def load_plain(folder, dtype):
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type == "dbrx":
        # transformers reads this number and then rotates by its default.
        config.rope_parameters = {"rope_type": "default", "rope_theta": config.attn_config.rope_theta}
    model, info = auto_class(folder).from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            raise SystemExit(f"{folder}: {what}: {sorted(map(str, info[what]))[:5]}")
    if not model.config.is_encoder_decoder:
        model.set_experts_implementation("eager")  # expert by expert, not through a grouped kernel
    # A model that may speak has no forward pass of its own.
    return getattr(model, "thinker", model).eval()


def outputs(folder, ids, mask=None, dtype=torch.float32):
    """Hidden states and logits of a folder, as the tensors of a golden file."""
    model = load(folder, dtype)
    if model.config.is_encoder_decoder:
        return encoder_outputs(model, ids)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    golden = {"input_ids": ids, "logits": out.logits.contiguous()}
    if mask is not None:
        golden["attention_mask"] = mask
    for i, hidden in enumerate(out.hidden_states):
        golden[f"hidden.{i}"] = hidden.contiguous()
    config = model.config.get_text_config()
    if len(out.hidden_states) != config.num_hidden_layers + 1:
        raise SystemExit(f"{folder}: {len(out.hidden_states)} hidden states")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic" and not rope.get("alpha"):
        golden["decoded_logits"] = decoded(model, ids, 6)
    return golden


def decoded(model, ids, prompt):
    """Logits with a cache: those of the prompt, then token by token."""
    cache, logits = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for piece in [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]:
            logits.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1).contiguous()


def encoder_outputs(model, ids):
    """The same of a model with an encoder: `ids` are the encoder's, the decoder's are made of them."""
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    decoder_ids = torch.cat([torch.zeros_like(ids[:, :1]), (ids[:, :16] * 7 + 3) % model.config.vocab_size], dim=1)
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=decoder_ids,
            output_hidden_states=True,
            use_cache=False,
        )
    golden = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "logits": out.logits.contiguous(),
    }
    with torch.no_grad(), tokens_per_expert(model, 4):
        limited = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False)
    golden["limited_logits"] = limited.logits.contiguous()
    golden["generated"] = generated(model, ids[:1])
    for prefix, states in [("", out.encoder_hidden_states), ("decoder.", out.decoder_hidden_states)]:
        for i, hidden in enumerate(states):
            golden[f"{prefix}hidden.{i}"] = hidden.contiguous()
    return golden


@contextlib.contextmanager
def tokens_per_expert(model, capacity):
    """The rule of transformers 4, which version 5 lost: an expert's tokens beyond `capacity` of a sequence get 0."""
    shape, hooks = None, []

    def enter(_, arguments):
        nonlocal shape
        shape = arguments[0].shape[:2]

    def limit(_, arguments, output):
        probabilities, chosen, logits = output
        in_sequences = chosen.reshape(*shape, -1)
        fits = in_sequences.cumsum(dim=1) <= capacity
        return probabilities, (in_sequences * fits).reshape(chosen.shape), logits

    for module in model.modules():
        if type(module).__name__ == "SwitchTransformersSparseMLP":
            hooks += [module.register_forward_pre_hook(enter), module.router.register_forward_hook(limit)]
    yield
    for hook in hooks:
        hook.remove()


def generated(model, ids):
    """The decoder's tokens, its start token first, of greedy decoding, each of which wins clearly."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids, do_sample=False, max_new_tokens=12, output_scores=True, return_dict_in_generate=True
    )
    best = torch.stack(out.scores).topk(2, dim=-1).values
    if (best[..., 0] - best[..., 1]).min() < 1e-3:
        raise SystemExit("two tokens are about as probable")
    return out.sequences


def difference(a, b, relative=False):
    """Largest difference between two goldens; relative: in units of each tensor's spread, if that is above 1."""
    worst = 0.0
    for name in a.keys() - {"input_ids", "attention_mask", "decoder_input_ids", "generated"}:
        unit = max(1.0, a[name].std().item()) if relative else 1.0
        worst = max(worst, (a[name].double() - b[name].double()).abs().max().item() / unit)
    return worst


# ------------------------------------------------------------------------------------------ fixtures


def write_checkpoint(folder, name, recipe, attempt):
    """Config and weights into an empty folder."""
    dtype = recipe.get("dtype", torch.float32)
    text = json.dumps(recipe["config"], indent=1) + "\n"
    quantization = recipe["config"].get("quantization_config")
    without = {k: v for k, v in recipe["config"].items() if k != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(known(without)))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = auto_class(folder).from_config(config, attn_implementation="eager", dtype=torch.float32)
    tied = recipe["config"].get("tie_word_embeddings", False)
    randomise(model, (name, attempt), dtype, recipe.get("embedding", 0.2 if tied else 1.0))
    if dtype != torch.float32:
        kept = {n: b.clone() for n, b in model.named_buffers() if is_choice_bias(n)}
        model.to(dtype)
        for n, b in kept.items():
            owner, leaf = n.rsplit(".", 1)
            getattr(model.get_submodule(owner), leaf).data = b
    model.save_pretrained(
        folder, max_shard_size=recipe.get("shard", "5GB"), save_original_format=not recipe.get("fused", False)
    )
    (folder / "generation_config.json").unlink(missing_ok=True)
    if not recipe.get("written_config"):
        (folder / "config.json").write_text(text)
    if quantization:
        pack(folder, quantization)
    if recipe["config"]["model_type"] == "kimi_linear" and not recipe.get("fused"):
        # transformers calls the MLP of a dense layer otherwise than the published checkpoint does.
        tensors = load_file(folder / "model.safetensors")
        tensors = {re.sub(r"block_sparse_moe\.(\w+_proj)", r"mlp.\1", name): t for name, t in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if recipe["config"]["model_type"] == "bailing_moe":
        tensors = as_bailing(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if recipe.get("multi_token"):
        text = config.get_text_config()
        behind = "mtp." if config.model_type.startswith(("qwen3", "nemotron")) else f"model.layers.{text.num_hidden_layers}."
        if config.model_type == "qwen3_omni_moe":
            behind = "talker.model.layers.0."
        add_multi_token(folder, name, behind, text.hidden_size)
    if recipe.get("six_digits"):
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        renamed = {}
        for old in sorted(set(content["weight_map"].values())):
            renamed[old] = old.replace("-of-", "-of-0")
            (folder / old).rename(folder / renamed[old])
        content["weight_map"] = {k: renamed[v] for k, v in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n")


def language(config):
    """The part of a configuration that speaks of the language model."""
    config = config.get("thinker_config", config)
    return config.get("text_config", config)


def padding(ids):
    """A mask with padding before the text of the first window and behind that of the second."""
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, -7:] = 0
    return mask


def make(name, recipe, checkpoint, golden_file):
    """One fixture: draw until the routers decide clearly, then write it.  Returns a line about it."""
    vocabulary, length = language(recipe["config"])["vocab_size"], recipe.get("length", 24)
    ids = torch.from_numpy(generator(name, "input_ids").integers(0, vocabulary, (2, length), dtype=np.int64))
    for attempt in range(50):
        with tempfile.TemporaryDirectory() as scratch:
            scratch = pathlib.Path(scratch)
            write_checkpoint(scratch, name, recipe, attempt)
            mask = padding(ids) if recipe.get("padded") else None
            with Margin() as margin:
                golden = outputs(scratch, ids, mask)
            if margin.least < CLOSEST_CALL:
                continue
            if difference(golden, outputs(scratch, ids, mask)) != 0.0:
                raise SystemExit(f"{name}: two runs differ")
            rounding = difference(golden, outputs(scratch, ids, mask, torch.float64), relative=True)
            if rounding > 3e-5:
                continue
            if checkpoint.exists():
                shutil.rmtree(checkpoint)
            checkpoint.mkdir(parents=True)
            for file in sorted(scratch.iterdir()):
                shutil.copyfile(file, checkpoint / file.name)
        # One metadata entry only: safetensors writes several in no fixed order.
        save_file(golden, golden_file, metadata={"transformers": transformers.__version__})
        spread = golden["logits"].std().item()
        size = sum(f.stat().st_size for f in checkpoint.iterdir())
        return (
            f"{name}: attempt {attempt}, {size} bytes, logit std {spread:.2f}, closest choice {margin.least:.1e}, "
            f"float64 differs by {rounding:.1e}"
        )
    raise SystemExit(f"{name}: no draw with clear choices")


def check(name, folder):
    """Whether the installed transformers still gives the committed outputs."""
    golden = load_file(folder / "golden.safetensors")
    mask = None if "decoder_input_ids" in golden else golden.get("attention_mask")
    worst = difference(golden, outputs(folder, golden["input_ids"], mask))
    print(f"{'ok  ' if worst <= 1e-4 else 'FAIL'} {name}: largest difference {worst:.2e}")
    return worst <= 1e-4


def version(text):
    """Numbers that can be compared."""
    return [int(number) for number in re.findall(r"\d+", text)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--out", type=pathlib.Path, default=here, help="folder of the fixtures (default: this one)")
    parser.add_argument("--only", nargs="+", choices=FIXTURES, default=list(FIXTURES), metavar="NAME")
    parser.add_argument("--check", action="store_true", help="compare the files there with transformers; write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if transformers.__version__ != MADE_WITH:
        print(
            f"note: transformers {transformers.__version__}; the committed files are from {MADE_WITH}", file=sys.stderr
        )
    installed = version(transformers.__version__)
    possible = [name for name in arguments.only if version(FIXTURES[name].get("since", "0")) <= installed]
    for name in arguments.only:
        if name not in possible:
            print(f"note: {name} needs transformers {FIXTURES[name]['since']}", file=sys.stderr)
    if arguments.check:
        sys.exit(0 if all([check(name, arguments.out / name) for name in possible]) else 1)
    for name in possible:
        folder = arguments.out / name
        print(make(name, FIXTURES[name], folder, folder / "golden.safetensors"))


if __name__ == "__main__":
    main()
