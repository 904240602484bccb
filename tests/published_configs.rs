//! The configs of published checkpoints, by the keys that matter, and options that would change the forward pass and are
//! refused instead of being passed over.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use moepress::architecture::{
    Activation, Architecture, AttentionSpec, FeedForwardSpec, GroupedAttention, LayerSpec, Mamba2,
    OutputGate, Packing, Span, WeightRule,
};
use serde_json::{Value, json};

fn read(config: &Value) -> Architecture {
    Architecture::from_config(&config.to_string()).unwrap()
}

/// Layers, layers with experts, experts in each, experts per token, and the largest width of shared experts.
fn sizes(architecture: &Architecture) -> [usize; 5] {
    let moe: Vec<_> = architecture.moe_layers().map(|(_, moe)| moe).collect();
    let shared = moe.iter().filter_map(|moe| moe.shared).map(|shared| shared.width).max().unwrap_or(0);
    [architecture.layers.len(), moe.len(), moe[0].experts, moe[0].router.top_k, shared]
}

fn refused(config: &Value, expected: &str) {
    let message = Architecture::from_config(&config.to_string()).unwrap_err().to_string();
    assert!(message.contains(expected) && !message.contains('\n'), "{message}");
}

/// `base` with the keys of `changes`.
fn with(base: &Value, changes: Value) -> Value {
    let mut config = base.clone();
    let Value::Object(changes) = changes else { unreachable!("changes are an object") };
    config.as_object_mut().unwrap().extend(changes);
    config
}

fn mixtral() -> Value {
    json!({"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_aux_loss_coef": 0.02, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32000})
}

fn deepseek_v3() -> Value {
    json!({"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "auto_map": {"AutoModel": "x"},
        "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163_840,
        "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
        "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-6,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "seq_aux": true, "tie_word_embeddings": false, "topk_group": 4,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129_280})
}

fn qwen3() -> Value {
    json!({"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-6,
        "rope_scaling": null, "rope_theta": 1_000_000.0, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151_936})
}

fn qwen2() -> Value {
    json!({"architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151_936})
}

fn llama4() -> Value {
    json!({"architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 200_080, "model_type": "llama4",
        "text_config": {"attention_bias": false, "attention_chunk_size": 8192, "attn_scale": 0.1,
        "attn_temperature_tuning": 4, "floor_scale": 8192, "for_llm_compressor": false, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 5120, "interleave_moe_layer_step": 1, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "max_position_embeddings": 10_485_760, "model_type": "llama4_text",
        "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
        "num_key_value_heads": 8, "num_local_experts": 16, "output_router_logits": false, "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500_000.0,
        "tie_word_embeddings": false, "use_qk_norm": true, "vocab_size": 202_048},
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vision_config": {"hidden_act": "gelu"}})
}

#[test]
fn mixtral_qwen_and_olmoe() {
    assert_eq!(sizes(&read(&mixtral())), [32, 32, 8, 2, 0]);
    assert_eq!(sizes(&read(&qwen2())), [24, 24, 60, 4, 5632]);
    let qwen2_57b = json!({"hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131_072,
        "max_window_layers": 28, "moe_intermediate_size": 2560, "norm_topk_prob": false, "num_attention_heads": 28,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "shared_expert_intermediate_size": 20480, "sliding_window": 65536});
    assert_eq!(sizes(&read(&with(&qwen2(), qwen2_57b))), [28, 28, 64, 8, 20480]);
    assert_eq!(sizes(&read(&qwen3())), [48, 48, 128, 8, 0]);
    let newer = json!({"max_position_embeddings": 262_144, "rope_theta": 10_000_000});
    assert_eq!(read(&with(&qwen3(), newer)).max_positions, 262_144);
    let packed = json!({"quantization_config": {"activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"],
        "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}});
    assert_eq!(read(&with(&qwen3(), packed)).packing, Some(Packing::Fp8 { block: Some([128, 128]) }));
    let olmoe = json!({"architectures": ["OlmoeForCausalLM"], "attention_bias": false, "clip_qkv": null,
        "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
        "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": false, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "pad_token_id": 1, "rope_scaling": null, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "vocab_size": 50304});
    assert_eq!(sizes(&read(&olmoe)), [16, 16, 64, 8, 0]);
}

/// Ling-lite-1.5 and Ling-mini-2.0.
#[test]
fn ling() {
    let first = json!({"architectures": ["BailingMoeForCausalLM"], "first_k_dense_replace": 0, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 32768,
        "model_type": "bailing_moe", "moe_intermediate_size": 1408, "multi_gate": false, "norm_head": false,
        "norm_softmax": false, "norm_topk_prob": true, "num_attention_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 6, "num_hidden_layers": 28, "num_key_value_heads": 4, "num_shared_experts": 2,
        "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 600_000, "tie_word_embeddings": false,
        "use_bias": false, "use_qkv_bias": false, "vocab_size": 126_464});
    let second = json!({"architectures": ["BailingMoeV2ForCausalLM"], "embedding_dropout": 0.0,
        "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 5120, "max_position_embeddings": 32768, "model_type": "bailing_moe",
        "moe_intermediate_size": 512, "moe_router_enable_expert_bias": true,
        "moe_router_enable_routed_scaling": true, "moe_router_enable_shared_expert": true,
        "moe_shared_expert_intermediate_size": 512, "n_group": 8, "norm_topk_prob": true, "num_attention_heads": 16,
        "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 20, "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0, "num_shared_experts": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6,
        "rope_scaling": null, "rope_theta": 600_000, "rotary_dim": 64, "routed_scaling_factor": 2.5,
        "router_dtype": "fp32", "score_function": "sigmoid", "tie_word_embeddings": false, "topk_group": 4,
        "use_bias": false, "use_qk_norm": true, "use_qkv_bias": false, "use_rmsnorm": true, "vocab_size": 157_184});
    assert_eq!(sizes(&read(&first)), [28, 28, 64, 6, 2816]);
    assert_eq!(read(&first).moe(0).unwrap().router.weights, WeightRule::RENORMALISED);
    let weights = |changes| read(&with(&first, changes)).moe(0).unwrap().router.weights;
    assert_eq!(weights(json!({"norm_topk_prob": null})), WeightRule::RENORMALISED);
    assert_eq!(weights(json!({"norm_topk_prob": false})), WeightRule::Scaled(1.0));
    assert_eq!(weights(json!({"num_experts_per_tok": 1})), WeightRule::Scaled(1.0));
    assert_eq!(sizes(&read(&second)), [20, 19, 256, 8, 512]);
    let unsaid = json!({"score_function": null, "use_qk_norm": null});
    assert_eq!(format!("{:?}", read(&with(&second, unsaid)).layers), format!("{:?}", read(&second).layers));
    refused(
        &with(&second, json!({"score_function": "tanh"})),
        "score_function is `tanh`; known: sigmoid, softmax",
    );
    refused(&with(&first, json!({"norm_head": true})), "norm_head is true, only false is supported here");
}

#[test]
fn deepseek_moe_16b() {
    let base = json!({"architectures": ["DeepseekForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 100_000, "eos_token_id": 100_001, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 4096,
        "model_type": "deepseek", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 28, "num_key_value_heads": 16, "pretraining_tp": 1, "rms_norm_eps": 1e-6,
        "rope_scaling": null, "rope_theta": 10000, "scoring_func": "softmax", "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 102_400});
    assert_eq!(sizes(&read(&base)), [28, 27, 64, 6, 2816]);
    let weights = |changes: Value| read(&with(&base, changes)).moe(27).unwrap().router.weights;
    assert_eq!(weights(json!({"routed_scaling_factor": 16.0})), WeightRule::Scaled(1.0));
    assert_eq!(weights(json!({"norm_topk_prob": true})), WeightRule::RENORMALISED);
    let one = json!({"norm_topk_prob": true, "num_experts_per_tok": 1});
    assert_eq!(weights(one), WeightRule::Scaled(1.0));
    let alternating = read(&with(&base, json!({"moe_layer_freq": 3, "n_shared_experts": null})));
    assert_eq!(sizes(&alternating), [28, 9, 64, 6, 0]);
    refused(
        &with(&base, json!({"scoring_func": "sigmoid"})),
        "scoring_func is \"sigmoid\", only \"softmax\"",
    );
    refused(&with(&base, json!({"n_routed_experts": null})), "num_experts is missing");
}

#[test]
fn deepseek_moonlight_and_kimi() {
    let lite = json!({"attention_bias": false, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163_840,
        "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": null,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_scaling": {"beta_fast": 32,
        "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102_400});
    assert_eq!(sizes(&read(&lite)), [27, 26, 64, 6, 2816]);
    let v3 = read(&deepseek_v3());
    assert_eq!(sizes(&v3), [61, 58, 256, 8, 2048]);
    assert_eq!(v3.packing, Some(Packing::Fp8 { block: Some(Packing::USUAL_FP8_BLOCK) }));
    let moonlight = json!({"first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264,
        "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": null, "quantization_config": null,
        "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 50000.0, "routed_scaling_factor": 2.446,
        "topk_group": 1, "vocab_size": 163_840});
    assert_eq!(sizes(&read(&with(&deepseek_v3(), moonlight))), [27, 26, 64, 6, 2816]);
    let kimi = json!({"model_type": "kimi_k2", "first_k_dense_replace": 1, "max_position_embeddings": 131_072,
        "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0, "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0,
        "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163_840});
    let kimi = with(&deepseek_v3(), kimi);
    assert_eq!(sizes(&read(&kimi)), [61, 60, 384, 8, 2048]);
    let of_images = json!({"model_type": "kimi_k25", "text_config": kimi, "tie_word_embeddings": false});
    let k25 = read(&of_images);
    assert_eq!(sizes(&k25), [61, 60, 384, 8, 2048]);
    assert_eq!(
        (k25.family, k25.config_section, k25.tied_embeddings),
        ("kimi_k25", &["text_config"][..], false)
    );
    assert_eq!(k25.names.embedding(), "language_model.model.embed_tokens.weight");
    // As transformers has it, whatever the language model itself says.
    assert!(read(&with(&of_images, json!({"tie_word_embeddings": null}))).tied_embeddings);
}

/// ERNIE-4.5-VL-28B-A3B, as transformers writes it and as first published.
#[test]
fn ernie_with_images() {
    let text = json!({"hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 12288,
        "max_position_embeddings": 131_072, "mlp_layer_types": (0..28)
        .map(|l| if l == 0 { "dense" } else { "sparse" }).collect::<Vec<_>>(), "model_type": "ernie4_5_vl_moe_text",
        "moe_intermediate_size": [1536, 512], "moe_k": 6, "moe_num_experts": 64, "moe_num_shared_experts": 2,
        "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        "rope_parameters": {"mrope_section": [22, 22, 20], "rope_theta": 500_000.0, "rope_type": "default"},
        "tie_word_embeddings": true, "use_bias": false, "use_cache": true, "vocab_size": 103_424});
    let whole = |text: &Value| {
        json!({"architectures": ["Ernie4_5_VLMoeForConditionalGeneration"], "image_token_id": 100_295,
            "model_type": "ernie4_5_vl_moe", "text_config": text, "tie_word_embeddings": true, "vision_config": {}})
    };
    let written = read(&whole(&text));
    assert_eq!((sizes(&written), written.tied_embeddings), ([28, 27, 64, 6, 3072], true));
    assert!(written.moe(0).is_none());
    let stretched = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}});
    refused(&whole(&with(&text, stretched)), "rope_type is `linear`; known for this family: default");
    let partial = json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}});
    refused(&whole(&with(&text, partial)), "partial_rotary_factor is 0.5");
    refused(&whole(&with(&text, json!({"moe_intermediate_size": 1536}))), "moe_intermediate_size is 1536");

    let published = json!({"architectures": ["Ernie4_5_VLMoeForConditionalGeneration"], "compression_ratio": 1.0,
        "freq_allocation": 20, "hidden_act": "silu", "hidden_size": 2560, "im_patch_id": 100_295,
        "intermediate_size": 12288, "max_position_embeddings": 131_072, "model_type": "ernie4_5_moe_vl",
        "moe_capacity": [128, 128, 128], "moe_gate": "topk", "moe_intermediate_size": [1536, 512], "moe_k": 6,
        "moe_layer_end_index": [29, 28], "moe_layer_interval": 1, "moe_layer_start_index": [1, 1],
        "moe_num_experts": [64, 64], "moe_num_shared_experts": 2, "moe_use_aux_free": true, "num_attention_heads": 20,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_3d": true,
        "rope_theta": 500_000, "tie_word_embeddings": true, "use_bias": false, "vision_config": {"depth": 32},
        "vocab_size": 103_424});
    let read_published = read(&published);
    let layers = |architecture: &Architecture| format!("{:?}", architecture.layers);
    assert_eq!(layers(&read_published), layers(&written));
    assert!(read_published.tied_embeddings);
    for (change, expected) in [
        (json!({"moe_num_experts": [64, 32]}), "moe_num_experts is 64 for text and 32 for images"),
        (json!({"moe_num_experts": 64}), "moe_num_experts is 64, expected a list"),
        (json!({"moe_layer_end_index": [29, 20]}), "moe_layer_end_index is 27 for text and 20 for images"),
        (json!({"moe_layer_start_index": [1]}), "moe_layer_start_index has 1 numbers, expected one for text"),
        (json!({"rms_norm_eps": null}), "rms_norm_eps is missing"),
        (json!({"moe_norm_gate_logits": false}), "moe_norm_gate_logits is false"),
    ] {
        refused(&with(&published, change), expected);
    }
}

/// Sarvam 30B and 105B, by the keys that transformers reads.
#[test]
fn sarvam() {
    let small = json!({"architectures": ["SarvamMoEForCausalLM"], "first_k_dense_replace": 1, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 8192, "max_position_embeddings": 131_072,
        "model_type": "sarvam_moe", "moe_intermediate_size": 1024, "moe_router_enable_expert_bias": true,
        "n_group": 1, "norm_topk_prob": true, "num_attention_heads": 64, "num_experts": 128,
        "num_experts_per_tok": 6, "num_hidden_layers": 19, "num_key_value_heads": 4, "num_shared_experts": 1,
        "rms_norm_eps": 1e-6, "rope_theta": 8_000_000, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
        "tie_word_embeddings": false, "topk_group": 1, "use_bias": false, "use_qk_norm": true,
        "use_qkv_bias": false, "vocab_size": 262_144});
    assert_eq!(sizes(&read(&small)), [19, 18, 128, 6, 1024]);
    refused(&with(&small, json!({"use_bias": true})), "use_bias is true");
    refused(&with(&small, json!({"score_function": "softmax"})), "score_function");
    let large = json!({"architectures": ["SarvamMLAForCausalLM"], "first_k_dense_replace": 1, "head_dim": 576,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 16384, "kv_lora_rank": 512,
        "max_position_embeddings": 131_072, "model_type": "sarvam_mla", "moe_intermediate_size": 2048,
        "norm_topk_prob": true, "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 32, "num_shared_experts": 1, "q_head_dim": 192, "q_lora_rank": null,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_scaling": {"beta_fast": 32,
        "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "deepseek_yarn"}, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "tie_word_embeddings": false, "v_head_dim": 128, "vocab_size": 262_144});
    let read_large = read(&large);
    assert_eq!(sizes(&read_large), [32, 31, 128, 8, 2048]);
    let AttentionSpec::Latent(attention) = &read_large.layers[0].attention else {
        unreachable!("every layer has latent attention")
    };
    assert_eq!(attention.query_rank, None);
    // YaRN by another name, which only this family knows.
    let yarn = with(&large["rope_scaling"], json!({"type": "yarn"}));
    let usual = read(&with(&large, json!({"rope_scaling": yarn})));
    assert_eq!(format!("{:?}", usual.layers), format!("{:?}", read_large.layers));
    refused(&with(&deepseek_v3(), json!({"rope_scaling": large["rope_scaling"]})), "is `deepseek_yarn`");
}

/// Kimi-VL-A3B, InternVL3.5-30B-A3B and -GPT-OSS-20B: families within models of text and images.
#[test]
fn language_models_within_others() {
    let mut moonlight = with(
        &deepseek_v3(),
        json!({"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1408, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "q_lora_rank": null, "rope_scaling": null}),
    );
    moonlight.as_object_mut().unwrap().remove("model_type");
    let kimi = json!({"model_type": "kimi_vl", "text_config": moonlight, "vision_config": {}});
    assert_eq!(sizes(&read(&kimi)), [27, 26, 64, 6, 2816]);
    let intern = |section: &str, kind: &str, text: Value| {
        read(&json!({"model_type": kind, section: text, "vision_config": {"model_type": "intern_vit_6b"}}))
    };
    let published = intern("llm_config", "internvl_chat", qwen3());
    assert_eq!(
        (published.family, published.names.embedding()),
        ("internvl_chat", "language_model.model.embed_tokens.weight".into())
    );
    assert_eq!(sizes(&published), [48, 48, 128, 8, 0]);
    assert!(!published.tied_embeddings);
    assert_eq!(sizes(&intern("text_config", "internvl", qwen3())), [48, 48, 128, 8, 0]);
    refused(&json!({"model_type": "internvl_chat"}), "llm_config is missing");
    for inner in ["qwen3", "qwen3_5_moe"] {
        let text = with(&qwen3(), json!({"model_type": inner, "text_config": qwen3()}));
        let expected = format!("llm_config.model_type is `{inner}`, which is no language model with experts");
        refused(&json!({"model_type": "internvl_chat", "llm_config": text}), &expected);
    }
    refused(&json!({"model_type": "kimi_vl", "text_config": {"model_type": 3}}), "model_type is 3");
}

#[test]
fn glm_dots_ernie_and_phi() {
    let glm = json!({"attention_bias": true, "eos_token_id": [151_329, 151_336], "first_k_dense_replace": 1, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131_072,
        "model_type": "glm4_moe", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 96, "num_experts_per_tok": 8,
        "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 1_000_000,
        "routed_scaling_factor": 1.0, "tie_word_embeddings": false, "topk_group": 1, "use_qk_norm": false,
        "vocab_size": 151_552});
    assert_eq!(sizes(&read(&glm)), [46, 45, 128, 8, 1408]);
    let dots = json!({"attention_bias": false, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 10944, "max_position_embeddings": 32768, "max_window_layers": 62, "model_type": "dots1",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 128,
        "n_shared_experts": 2, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts_per_tok": 6,
        "num_hidden_layers": 62, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 10_000_000,
        "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc", "sliding_window": null, "topk_group": 1,
        "vocab_size": 152_064});
    assert_eq!(sizes(&read(&dots)), [62, 61, 128, 6, 2816]);
    let ernie = json!({"hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 12288,
        "max_position_embeddings": 131_072, "model_type": "ernie4_5_moe", "moe_capacity": [64, 64, 64],
        "moe_gate": "topk", "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_interval": 1,
        "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_use_aux_free": true,
        "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 4, "num_nextn_predict_layers": 1,
        "pad_token_id": 0, "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 500_000.0,
        "tie_word_embeddings": true, "use_bias": false, "vocab_size": 103_424});
    let read_ernie = read(&ernie);
    assert_eq!(sizes(&read_ernie), [28, 27, 64, 6, 3072]);
    assert!(read_ernie.tied_embeddings);
    let factors = vec![1.5; 64];
    let phi = json!({"attention_bias": true, "hidden_act": "silu", "hidden_size": 4096, "input_jitter_noise": 0.01,
        "intermediate_size": 6400, "lm_head_bias": true, "max_position_embeddings": 131_072, "model_type": "phimoe",
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 16, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_scaling": {"long_factor": factors, "long_mscale": 1.243_163_121_016_122,
        "original_max_position_embeddings": 4096, "short_factor": factors, "short_mscale": 1.243_163_121_016_122,
        "type": "longrope"}, "rope_theta": 10000.0, "router_jitter_noise": 0.01, "sliding_window": 131_072,
        "tie_word_embeddings": false, "vocab_size": 32064});
    assert_eq!(sizes(&read(&phi)), [32, 32, 16, 2, 0]);
}

fn qwen3_next() -> Value {
    json!({"architectures": ["Qwen3NextForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151_643, "decoder_sparse_step": 1, "eos_token_id": 151_645, "full_attention_interval": 4,
        "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
        "max_position_embeddings": 262_144, "mlp_only_layers": [], "model_type": "qwen3_next",
        "moe_intermediate_size": 512, "norm_topk_prob": true, "num_attention_heads": 16, "num_experts": 512,
        "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": false,
        "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 10_000_000,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151_936})
}

fn qwen3_5() -> Value {
    let types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"].repeat(10);
    json!({"architectures": ["Qwen3_5MoeForConditionalGeneration"], "image_token_id": 248_056,
        "model_type": "qwen3_5_moe", "text_config": {"attention_bias": false, "attn_output_gate": true,
        "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048,
        "layer_types": types, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262_144, "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 512,
        "mtp_num_hidden_layers": 1, "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8,
        "num_hidden_layers": 40, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_parameters":
        {"mrope_interleaved": true, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 10_000_000, "rope_type": "default"}, "shared_expert_intermediate_size": 512,
        "vocab_size": 248_320}, "tie_word_embeddings": false, "vision_config": {"depth": 27,
        "model_type": "qwen3_5_moe"}})
}

/// The keys of transformers' class with the sizes of 30B-A3B; the published file was not at hand.
fn qwen3_omni() -> Value {
    let text = with(
        &qwen3(),
        json!({"intermediate_size": 768, "max_position_embeddings": 65536, "model_type": "qwen3_omni_moe_text",
        "rope_scaling": {"interleaved": true, "mrope_interleaved": true, "mrope_section": [24, 20, 20],
        "rope_type": "default", "type": "default"}, "rope_theta": 1_000_000, "shared_expert_intermediate_size": 0,
        "use_qk_norm": true, "vocab_size": 152_064}),
    );
    json!({"architectures": ["Qwen3OmniMoeForConditionalGeneration"], "assistant_token_id": 77091,
        "code2wav_config": {"hidden_size": 1024}, "enable_audio_output": true, "model_type": "qwen3_omni_moe",
        "talker_config": {"text_config": {"hidden_size": 1024, "num_experts": 128, "num_hidden_layers": 20}},
        "thinker_config": {"audio_config": {"d_model": 1280}, "model_type": "qwen3_omni_moe_thinker",
        "text_config": text, "vision_config": {"depth": 27}}})
}

#[test]
fn qwen3_omni_and_its_thinker() {
    let omni = read(&qwen3_omni());
    assert_eq!((sizes(&omni), omni.max_positions), ([48, 48, 128, 8, 0], 65536));
    assert!(!omni.tied_embeddings);
    assert_eq!(grouped(&omni, 0).head_dim, 128);
    let thinker = |changes: Value| json!({"thinker_config": with(&qwen3_omni()["thinker_config"], changes)});
    let text = |changes: Value| {
        let text = with(&qwen3_omni()["thinker_config"]["text_config"], changes);
        with(&qwen3_omni(), thinker(json!({"text_config": text})))
    };
    assert!(read(&with(&qwen3_omni(), thinker(json!({"tie_word_embeddings": true})))).tied_embeddings);
    let plain = read(&text(json!({"norm_topk_prob": false})));
    assert_eq!(plain.moe(0).unwrap().router.weights, WeightRule::Scaled(1.0));
    assert_eq!(sizes(&read(&text(json!({"mlp_only_layers": [0, 5]}))))[1], 46);
    let packed = read(&text(json!({"quantization_config": {"quant_method": "fp8"}})));
    assert_eq!(packed.packing, Some(Packing::Fp8 { block: None }));
    refused(&with(&qwen3_omni(), json!({"thinker_config": null})), "thinker_config is missing");
    refused(&with(&qwen3_omni(), thinker(json!({"text_config": null}))), "text_config is missing");
    refused(&with(&qwen3_omni(), thinker(json!({"text_config": 3}))), "text_config is 3, expected an object");
    refused(&text(json!({"num_experts": null})), "num_experts is missing");
    let scaled = json!({"rope_scaling": {"rope_type": "axial"}});
    refused(&text(scaled), "rope_type is `axial`; known: default");
}

fn lfm2() -> Value {
    let types = ["conv", "conv", "full_attention", "conv", "conv", "conv"].repeat(4);
    json!({"architectures": ["Lfm2MoeForCausalLM"], "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": false,
        "eos_token_id": 7, "hidden_size": 2048, "intermediate_size": 7168, "layer_types": types,
        "max_position_embeddings": 128_000, "model_type": "lfm2_moe", "moe_intermediate_size": 1792,
        "norm_eps": 1e-5, "norm_topk_prob": true, "num_attention_heads": 32, "num_dense_layers": 2,
        "num_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "rope_theta": 1_000_000.0, "routed_scaling_factor": 1.0, "tie_embedding": true, "use_expert_bias": true,
        "vocab_size": 65536})
}

/// Layers that attend, by number.
fn attending(architecture: &Architecture) -> Vec<usize> {
    let layers = architecture.layers.iter().enumerate();
    layers.filter(|(_, layer)| layer.attention.is_attention()).map(|(l, _)| l).collect()
}

#[test]
fn qwen3_next_and_lfm2() {
    let next = read(&qwen3_next());
    assert_eq!(sizes(&next), [48, 48, 512, 10, 512]);
    assert_eq!(attending(&next)[..3], [3, 7, 11]);
    assert!(next.layers[3].attention.rope().is_some_and(|rope| rope.dim() == 64));
    let AttentionSpec::GatedDelta(delta) = next.layers[0].attention else { unreachable!() };
    assert_eq!((delta.qkv_dim(), delta.all_values()), (8192, 4096));
    let whole = read(&qwen3_5());
    assert_eq!(sizes(&whole), [40, 40, 256, 8, 512]);
    assert_eq!((attending(&whole).len(), whole.max_positions), (10, 262_144));
    assert!(!whole.tied_embeddings);
    assert_eq!(sizes(&read(&qwen3_5()["text_config"])), [40, 40, 256, 8, 512]);
    let lfm = read(&lfm2());
    assert_eq!(sizes(&lfm), [24, 22, 32, 4, 0]);
    assert_eq!(attending(&lfm), [2, 8, 14, 20]);
    assert!(lfm.tied_embeddings);
}

fn kimi_linear() -> Value {
    let full = [4, 8, 12, 16, 20, 24, 27];
    let delta: Vec<usize> = (1..=27).filter(|l| !full.contains(l)).collect();
    json!({"architectures": ["KimiLinearForCausalLM"], "bos_token_id": 163_584, "eos_token_id": 163_586,
        "first_k_dense_replace": 1, "head_dim": 72, "hidden_act": "silu", "hidden_size": 2304,
        "intermediate_size": 9216, "kv_lora_rank": 512, "linear_attn_config": {"full_attn_layers": full,
        "head_dim": 128, "kda_layers": delta, "num_heads": 32, "short_conv_kernel_size": 4}, "mla_use_nope": true,
        "model_max_length": 1_048_576, "model_type": "kimi_linear", "moe_intermediate_size": 1024,
        "moe_layer_freq": 1, "moe_renormalize": true, "moe_router_activation_func": "sigmoid",
        "num_attention_heads": 32, "num_expert_group": 1, "num_experts": 256, "num_experts_per_token": 8,
        "num_hidden_layers": 27, "num_key_value_heads": 32, "num_nextn_predict_layers": 0,
        "num_shared_experts": 1, "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 10000.0, "routed_scaling_factor": 2.446,
        "tie_word_embeddings": false, "topk_group": 1, "use_grouped_topk": true, "v_head_dim": 128,
        "vocab_size": 163_840})
}

#[test]
fn kimi() {
    let kimi = read(&kimi_linear());
    assert_eq!(sizes(&kimi), [27, 26, 256, 8, 1024]);
    assert_eq!(attending(&kimi), [3, 7, 11, 15, 19, 23, 26]);
    assert_eq!(kimi.max_positions, usize::MAX);
    let changed = |key: &str, value: Value| with(&kimi_linear(), json!({ key: value }));
    let lists = |full: &[usize], delta: &[usize]| {
        let mut section = kimi_linear()["linear_attn_config"].clone();
        (section["full_attn_layers"], section["kda_layers"]) = (json!(full), json!(delta));
        changed("linear_attn_config", section)
    };
    refused(
        &lists(&[1], &[2]),
        "linear_attn_config lists layer 3 in neither of full_attn_layers and kda_layers",
    );
    refused(
        &lists(&[1, 2], &[2]),
        "linear_attn_config lists layer 2 in both of full_attn_layers and kda_layers",
    );
    refused(&changed("linear_attn_config", json!({"num_heads": 0})), "num_heads is 0, expected at least 1");
    refused(&changed("mla_use_nope", json!(false)), "mla_use_nope is false, only true is supported");
    refused(
        &changed("moe_router_activation_func", json!("softmax")),
        "moe_router_activation_func is \"softmax\"",
    );
    let expected = "mlp_layer_types expected `dense` or `sparse` for each of 27 layers";
    refused(&changed("mlp_layer_types", json!(["sparse"])), expected);
}

#[test]
fn layers_of_kinds_that_do_not_fit_are_refused() {
    let changed = |base: &Value, key: &str, value: Value| with(base, json!({ key: value }));
    let next =
        |key: &str, value: Value, expected: &str| refused(&changed(&qwen3_next(), key, value), expected);
    let kinds = vec!["linear_attention"; 47];
    next("layer_types", json!(kinds), "layer_types has 47 entries, expected 48");
    let mut kinds = vec!["linear_attention"; 48];
    kinds[2] = "mamba";
    next(
        "layer_types",
        json!(kinds),
        "layer_types is `mamba` in layer 2, expected `full_attention` or `linear_",
    );
    next("layer_types", json!("all"), "layer_types is \"all\", expected a list of strings");
    next("full_attention_interval", json!(0), "full_attention_interval is 0, expected at least 1");
    next("linear_conv_kernel_dim", json!(0), "linear_conv_kernel_dim is 0, expected at least 1");
    next("linear_key_head_dim", json!(0), "linear_key_head_dim is 0, expected at least 1");
    next("linear_num_key_heads", json!(0), "linear_num_key_heads is 0, expected at least 1");
    let expected = "linear_num_key_heads is 5, expected a divisor of linear_num_value_heads = 32";
    next("linear_num_key_heads", json!(5), expected);
    next("num_key_value_heads", json!(3), "num_key_value_heads is 3, expected a divisor");
    refused(&json!({"model_type": "qwen3_5_moe"}), "text_config is missing");
    refused(&changed(&lfm2(), "layer_types", Value::Null), "layer_types is missing");
    refused(&changed(&lfm2(), "layer_types", json!(["conv"])), "layer_types has 1 entries, expected 24");
    let expected = "layer_types is `linear_attention` in layer 0, expected `full_attention` or `conv`";
    refused(&changed(&lfm2(), "layer_types", json!(vec!["linear_attention"; 24])), expected);
    refused(&changed(&lfm2(), "conv_L_cache", json!(0)), "conv_L_cache is 0, expected at least 1");
}

#[test]
fn gpt_oss_llama_and_switch() {
    let types = ["sliding_attention", "full_attention"].repeat(12);
    let gpt_oss = json!({"attention_bias": true, "eos_token_id": 200_002, "experts_per_token": 4, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": types, "max_position_embeddings": 131_072, "model_type": "gpt_oss", "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-5, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
        "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false}, "rope_theta": 150_000,
        "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": false, "vocab_size": 201_088});
    let read_gpt_oss = read(&gpt_oss);
    assert_eq!(sizes(&read_gpt_oss), [24, 24, 32, 4, 0]);
    let spans = |architecture: &Architecture| -> Vec<Span> {
        let span = |attention: &AttentionSpec| match attention {
            AttentionSpec::Grouped(attention) => attention.span,
            _ => Span::Full,
        };
        architecture.layers.iter().map(|layer| span(&layer.attention)).collect()
    };
    assert_eq!(spans(&read_gpt_oss)[..2], [Span::Window(128), Span::Full]);

    let scout = read(&llama4());
    assert_eq!(sizes(&scout), [48, 48, 16, 1, 8192]);
    let tuned = |l: usize| match &scout.layers[l].attention {
        AttentionSpec::Grouped(attention) => attention.temperature.is_some(),
        _ => false,
    };
    assert_eq!([2, 3].map(tuned), [false, true], "every fourth layer has no positions, and growing scores");

    let switch = json!({"add_router_probs": false, "architectures": ["SwitchTransformersForConditionalGeneration"],
        "d_ff": 3072, "d_kv": 64, "d_model": 768, "decoder_start_token_id": 0, "dense_act_fn": "relu",
        "dropout_rate": 0.1, "eos_token_id": 1, "expert_capacity": 64, "feed_forward_proj": "relu",
        "initializer_factor": 1.0, "is_encoder_decoder": true, "is_gated_act": false, "layer_norm_epsilon": 1e-6,
        "model_type": "switch_transformers", "num_decoder_layers": 12, "num_experts": 8, "num_heads": 12,
        "num_layers": 12, "num_sparse_decoder_layers": 6, "num_sparse_encoder_layers": 6, "pad_token_id": 0,
        "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "router_aux_loss_coef": 0.001,
        "router_bias": false, "router_dtype": "float32", "router_ignore_padding_tokens": false,
        "router_jitter_noise": 0.01, "router_type": "tokens_masked", "router_z_loss_coef": 0.001, "use_cache": true,
        "vocab_size": 32128});
    assert_eq!(sizes(&read(&switch)), [24, 12, 8, 1, 0]);
    refused(&with(&switch, json!({"router_dtype": "bfloat16"})), "router_dtype is \"bfloat16\"");
    refused(&with(&switch, json!({"expert_capacity": 0})), "expert_capacity is 0, expected at least 1");
}

fn granite() -> Value {
    json!({"architectures": ["GraniteMoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.1,
        "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "hidden_act": "silu",
        "hidden_size": 1536, "intermediate_size": 512, "logits_scaling": 6.0, "max_position_embeddings": 131_072,
        "model_type": "granitemoe", "num_attention_heads": 24, "num_experts_per_tok": 8, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 40, "residual_multiplier": 0.22, "rms_norm_eps": 1e-6,
        "rope_scaling": null, "rope_theta": 10_000_000, "tie_word_embeddings": true, "vocab_size": 49155})
}

fn granite_4_tiny() -> Value {
    let types: Vec<_> = (0..40).map(|l| if l % 10 == 5 { "attention" } else { "mamba" }).collect();
    json!({"architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": false,
        "attention_multiplier": 0.0078125, "embedding_multiplier": 12, "hidden_act": "silu", "hidden_size": 1536,
        "init_method": "mup", "intermediate_size": 512, "layer_types": types, "logits_scaling": 6,
        "mamba_chunk_size": 256, "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_head": 64,
        "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 48,
        "mamba_proj_bias": false, "max_position_embeddings": 131_072, "model_type": "granitemoehybrid",
        "normalization_function": "rmsnorm", "num_attention_heads": 12, "num_experts_per_tok": 6,
        "num_hidden_layers": 40, "num_key_value_heads": 4, "num_local_experts": 64,
        "position_embedding_type": "nope", "residual_multiplier": 0.22, "rms_norm_eps": 1e-5,
        "rope_scaling": null, "rope_theta": 10000, "shared_intermediate_size": 1024,
        "tie_word_embeddings": true, "vocab_size": 100_352})
}

/// Sizes of the state space model of layer `l`.
fn mamba2(architecture: &Architecture, l: usize) -> Mamba2 {
    let AttentionSpec::Mamba2(mamba) = architecture.layers[l].attention else {
        unreachable!("of another kind")
    };
    mamba
}

#[test]
fn granite_4() {
    let tiny = read(&granite_4_tiny());
    assert_eq!(sizes(&tiny), [40, 40, 64, 6, 1024]);
    assert_eq!(attending(&tiny), [5, 15, 25, 35]);
    assert!(tiny.layers[5].attention.rope().is_none());
    // Texts are as long as one likes where no layer has positions, and only there.
    assert_eq!(tiny.max_positions, usize::MAX);
    let rotated = read(&with(&granite_4_tiny(), json!({"position_embedding_type": "rope"})));
    assert_eq!(rotated.max_positions, 131_072);
    let mamba = mamba2(&tiny, 0);
    assert_eq!((mamba.width(), mamba.channels(), mamba.projected()), (3072, 3328, 6448));
    assert_eq!(mamba.step_limits, [0.0, f32::INFINITY]);
    let changed = |key: &str, value: Value| with(&granite_4_tiny(), json!({ key: value }));
    // Without a list, all layers are of Mamba; a width that is not said follows from the others.
    let all = read(&changed("layer_types", Value::Null));
    assert_eq!(attending(&all), [0usize; 0]);
    assert_eq!(mamba2(&read(&changed("mamba_d_head", json!("auto"))), 39), mamba);
    for unlimited in [json!([0.0, {"__float__": "Infinity"}]), json!([0, 1e39]), Value::Null] {
        assert_eq!(mamba2(&read(&changed("time_step_limit", unlimited)), 0), mamba);
    }
    // As Python writes it.
    let written = json!({"time_step_limit": [0.25, "?"], "note": "\"Infinity\" is no number"});
    let text = with(&granite_4_tiny(), written).to_string().replace("\"?\"", "Infinity");
    let limited = Architecture::from_config(&text).unwrap();
    assert_eq!(mamba2(&limited, 0).step_limits, [0.25, f32::INFINITY]);

    let odd = |key: &str, value: Value, expected: &str| refused(&changed(key, value), expected);
    odd("layer_types", json!(["mamba"]), "layer_types has 1 entries, expected 40, as num_hidden_layers says");
    odd(
        "layer_types",
        json!(vec!["conv"; 40]),
        "layer_types is `conv` in layer 0, expected one of `mamba`, `linear_attention`, `attention`",
    );
    let expected = "mamba_n_heads is 32: 32 heads of 64 are not mamba_expand · hidden_size = 3072 wide";
    odd("mamba_n_heads", json!(32), expected);
    odd("mamba_n_groups", json!(2), "mamba_n_groups is 2, only 1 is supported here");
    odd("mamba_d_conv", json!(0), "mamba_d_conv is 0, expected at least 1");
    odd("time_step_limit", json!([1.0, 0.5]), "time_step_limit is [1.0,0.5], expected two numbers");
}

/// The keys of transformers' class; the published file was not at hand.
#[test]
fn granite_swash() {
    let types: Vec<_> =
        (0..8).map(|l| if l % 4 == 0 { "full_attention" } else { "sliding_attention" }).collect();
    let bases: Vec<_> = (0..8).map(|l| if l % 4 == 0 { 0 } else { 10000 }).collect();
    let swash = with(
        &granite(),
        json!({"architectures": ["GraniteMoeSWAForCausalLM"], "layer_rope_theta": bases, "layer_types": types,
        "model_type": "granitemoe_swa", "num_hidden_layers": 8, "shared_intermediate_size": 1024,
        "sliding_window": 256}),
    );
    let architecture = read(&swash);
    assert_eq!(sizes(&architecture), [8, 8, 40, 8, 1024]);
    let kinds = |a: &Architecture, l: usize| (grouped(a, l).span, grouped(a, l).rope.is_some());
    assert_eq!(kinds(&architecture, 4), (Span::Full, false));
    assert_eq!(kinds(&architecture, 5), (Span::Window(256), true));
    assert!(architecture.layers.iter().enumerate().all(|(l, _)| grouped(&architecture, l).sinks));
    // Without lists, every fourth layer from the first on attends to everything, and all rotate.
    let absent = json!({"layer_types": null, "layer_rope_theta": null, "sliding_window": null});
    let absent = read(&with(&swash, absent));
    assert_eq!((kinds(&absent, 4), kinds(&absent, 5)), ((Span::Full, true), (Span::Full, true)));
    let mut unsaid = swash.clone();
    unsaid
        .as_object_mut()
        .unwrap()
        .retain(|key, _| !["layer_types", "sliding_window"].contains(&key.as_str()));
    assert_eq!([4, 5].map(|l| kinds(&read(&unsaid), l).0), [Span::Full, Span::Window(128)]);
    for (change, expected) in [
        (json!({"layer_rope_theta": [1e4]}), "layer_rope_theta has 1 entries, expected 8"),
        (
            json!({"layer_rope_theta": [0, 0, 0, 0, 0, 0, 0, -1]}),
            "layer_rope_theta is -1, expected more than 1",
        ),
        (json!({"layer_types": ["full_attention"]}), "layer_types has 1 entries, expected 8"),
        (json!({"layer_rope_theta": "none"}), "layer_rope_theta is \"none\", expected a list"),
    ] {
        refused(&with(&swash, change), expected);
    }
}

/// The keys of transformers' class; the published file was not at hand.
#[test]
fn laguna() {
    let types = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"].repeat(10);
    let heads: Vec<_> = (0..40).map(|l| if l % 4 == 0 { 48 } else { 64 }).collect();
    let laguna = json!({"architectures": ["LagunaForCausalLM"], "attention_bias": false, "gating": true,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "layer_types": types,
        "max_position_embeddings": 131_072, "model_type": "laguna", "moe_intermediate_size": 512,
        "moe_routed_scaling_factor": 2.5, "num_attention_heads": 48, "num_attention_heads_per_layer": heads,
        "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6, "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5, "rope_theta": 5e5,
        "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}},
        "shared_expert_intermediate_size": 512, "sliding_window": 512, "vocab_size": 100_352});
    let architecture = read(&laguna);
    assert_eq!(sizes(&architecture), [40, 39, 256, 8, 512]);
    let kinds = |a: &Architecture, l: usize| {
        let attention = grouped(a, l);
        (attention.heads, attention.span, attention.rope.as_ref().unwrap().dim())
    };
    assert_eq!(kinds(&architecture, 0), (48, Span::Full, 64));
    assert_eq!(kinds(&architecture, 1), (64, Span::Window(512), 128));
    assert_eq!(grouped(&architecture, 0).output_gate, OutputGate::Softplus { per_head: true });
    // What absent keys mean is the same.
    let absent =
        json!({"rope_parameters": null, "num_attention_heads_per_layer": null, "gating": "per-element"});
    let absent = read(&with(&laguna, absent));
    assert_eq!(kinds(&absent, 1), (48, Span::Window(512), 128));
    assert_eq!(grouped(&absent, 0).rope, grouped(&architecture, 0).rope);
    assert_eq!(grouped(&absent, 0).output_gate, OutputGate::Softplus { per_head: false });
    for (change, expected) in [
        (json!({"gating": false}), "gating is false; known: true, \"per-head\", \"per-element\""),
        (json!({"moe_router_logit_softcapping": 30.0}), "moe_router_logit_softcapping is 30.0, only 0"),
        (
            json!({"moe_apply_router_weight_on_input": true}),
            "moe_apply_router_weight_on_input is true, only false",
        ),
        (
            json!({"num_attention_heads_per_layer": [48]}),
            "num_attention_heads_per_layer has 1 entries, expected 40",
        ),
        (json!({"num_attention_heads_per_layer": vec![0; 40]}), "num_attention_heads_per_layer has a 0"),
        (
            json!({"num_attention_heads_per_layer": vec![12; 40]}),
            "num_key_value_heads is 8, expected a divisor",
        ),
        (json!({"layer_types": vec!["conv"; 40]}), "layer_types is `conv` in layer 0"),
        (json!({"rope_parameters": {"full_attention": 3}}), "full_attention is 3, expected an object"),
    ] {
        refused(&with(&laguna, change), expected);
    }
}

/// The keys of transformers' class; the published file was not at hand.
#[test]
fn aria() {
    let text = json!({"hidden_size": 2560, "intermediate_size": 1664, "max_position_embeddings": 65536,
        "model_type": "aria_text", "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_topk": 6,
        "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 20, "rope_theta": 5_000_000,
        "vocab_size": 100_352});
    let whole = |changes: Value| {
        json!({"architectures": ["AriaForConditionalGeneration"], "image_token_index": 9, "model_type": "aria",
            "text_config": with(&text, changes), "vision_config": {"model_type": "idefics3_vision"}})
    };
    let architecture = read(&whole(json!({})));
    assert_eq!(sizes(&architecture), [28, 28, 64, 6, 3328]);
    assert!(!architecture.tied_embeddings && !architecture.mlp_bias);
    assert!(read(&whole(json!({"mlp_bias": true}))).mlp_bias);
    assert_eq!(sizes(&read(&whole(json!({"moe_num_shared_experts": 0}))))[4], 0);
    refused(&json!({"model_type": "aria"}), "text_config is missing");
    refused(&whole(json!({"moe_topk": 65})), "num_experts_per_tok is 65, expected 1 to 64");
    refused(&whole(json!({"hidden_act": "gelu"})), "hidden_act is \"gelu\"");
}

fn jamba() -> Value {
    json!({"architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 4,
        "attn_layer_period": 8, "bos_token_id": 1, "eos_token_id": [2, 518], "expert_layer_offset": 1,
        "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_dt_rank": 256, "mamba_expand": 2,
        "mamba_inner_layernorms": true, "mamba_proj_bias": false, "max_position_embeddings": 262_144,
        "model_type": "jamba", "num_attention_heads": 32, "num_experts": 16, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_logits_to_keep": 1,
        "output_router_logits": false, "pad_token_id": 0, "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.001,
        "sliding_window": null, "tie_word_embeddings": false, "use_mamba_kernels": true, "vocab_size": 65536})
}

#[test]
fn jamba_mini() {
    let mini = read(&jamba());
    assert_eq!(sizes(&mini), [32, 16, 16, 2, 0]);
    assert_eq!(attending(&mini), [4, 12, 20, 28]);
    assert_eq!(mini.max_positions, usize::MAX);
    assert!(mini.layers[4].attention.rope().is_none());
    assert!(mini.moe(0).is_none() && mini.moe(1).is_some_and(|moe| moe.width == 14336));
    let changed = |key: &str, value: Value| with(&jamba(), json!({ key: value }));
    let AttentionSpec::Mamba(mamba) = read(&changed("mamba_dt_rank", json!("auto"))).layers[0].attention
    else {
        unreachable!("of another kind")
    };
    assert_eq!((mamba.width, mamba.state_dim, mamba.step_rank), (8192, 16, 256));
    let odd = |key: &str, value: Value, expected: &str| refused(&changed(key, value), expected);
    odd("attn_layer_offset", json!(8), "attn_layer_offset is 8, expected less than attn_layer_period = 8");
    odd("expert_layer_period", json!(0), "expert_layer_period is 0, expected at least 1");
    odd("mamba_dt_rank", json!(0), "mamba_dt_rank is 0, expected at least 1");
    odd("mamba_inner_layernorms", json!(false), "mamba_inner_layernorms is false, only true is supported");
}

fn nemotron_3_nano() -> Value {
    json!({"architectures": ["NemotronHForCausalLM"], "attention_bias": false, "chunk_size": 128, "conv_kernel": 4,
        "expand": 2, "head_dim": 128, "hidden_size": 2688, "hybrid_override_pattern":
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "intermediate_size": 1856,
        "layer_norm_epsilon": 1e-5, "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 64,
        "mamba_proj_bias": false, "max_position_embeddings": 262_144, "mlp_bias": false,
        "mlp_hidden_act": "relu2", "model_type": "nemotron_h", "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712, "n_group": 1, "n_groups": 8, "n_routed_experts": 128,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts_per_tok": 6,
        "num_hidden_layers": 52, "num_key_value_heads": 2, "partial_rotary_factor": 1.0, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "sliding_window": null, "ssm_state_size": 128,
        "tie_word_embeddings": false, "time_step_limit": [0.0, {"__float__": "Infinity"}], "topk_group": 1,
        "use_bias": false, "use_conv_bias": true, "vocab_size": 131_072})
}

#[test]
fn nemotron_3() {
    let nano = read(&nemotron_3_nano());
    assert_eq!(sizes(&nano), [52, 23, 128, 6, 3712]);
    assert_eq!(attending(&nano), [5, 12, 19, 26, 33, 42]);
    assert!(nano.layers[5].attention.rope().is_none());
    assert_eq!(nano.max_positions, usize::MAX);
    let halves = |l: usize| {
        let LayerSpec { attention, feed_forward } = &nano.layers[l];
        [matches!(attention, AttentionSpec::None), matches!(feed_forward, FeedForwardSpec::None)]
    };
    assert_eq!([0, 1, 5].map(halves), [[false, true], [true, false], [false, true]]);
    let mamba = mamba2(&nano, 0);
    assert_eq!((mamba.width(), mamba.channels(), mamba.projected()), (4096, 6144, 10304));
    assert_eq!(mamba.step_limits, [0.001, f32::INFINITY]);
    let moe = nano.moe(1).unwrap();
    assert_eq!((moe.activation, moe.width), (Activation::SquaredRelu, 1856));

    let changed = |key: &str, value: Value| with(&nemotron_3_nano(), json!({ key: value }));
    let odd = |key: &str, value: Value, expected: &str| refused(&changed(key, value), expected);
    odd("hybrid_override_pattern", json!("ME"), "hybrid_override_pattern has 2 entries, expected 52");
    odd(
        "hybrid_override_pattern",
        json!("ME-X".repeat(13)),
        "hybrid_override_pattern is `X` in layer 3, expected one of `M`, `*`, `E`, `-`",
    );
    odd("layers_block_type", json!(vec!["conv"; 52]), "layers_block_type is `conv` in layer 0");
    odd("mlp_hidden_act", json!("silu"), "mlp_hidden_act is \"silu\", only \"relu2\"");
    odd("attention_bias", json!(true), "attention_bias is true, only false is supported here");
    odd("n_groups", json!(7), "n_groups is 7, expected a divisor of the 64 heads");
    odd("time_step_limit", json!([0.0, 0.5]), "time_step_limit is from 0 to 0.5, only 0 to infinity is");
    odd("moe_latent_size", json!(0), "moe_latent_size is 0, expected at least 1");
    let latent = read(&changed("moe_latent_size", json!(1024)));
    assert_eq!(latent.expert_io(latent.moe(1).unwrap()), 1024);
    assert_eq!(nano.expert_io(moe), 2688);
}

fn minimax() -> Value {
    json!({"architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": [1, 1, 1], "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 3072, "intermediate_size": 1536, "max_position_embeddings": 196_608, "model_type": "minimax_m2",
        "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
        "num_local_experts": 256, "num_mtp_modules": 3, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000, "rotary_dim": 64, "scoring_func": "sigmoid", "shared_intermediate_size": 0,
        "sliding_window": null, "tie_word_embeddings": false, "use_mtp": true, "use_qk_norm": true,
        "use_routing_bias": true, "vocab_size": 200_064, "quantization_config": {"activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn", "quant_method": "fp8", "weight_block_size": [128, 128]}})
}

fn hunyuan() -> Value {
    json!({"architectures": ["HunYuanMoEV1ForCausalLM"], "attention_bias": false, "attention_head_dim": 128, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 3072, "max_position_embeddings": 32768,
        "mlp_bias": false, "model_type": "hunyuan_v1_moe", "moe_intermediate_size": [3072, 3072],
        "moe_layer_num_skipped": 0, "moe_topk": [8, 8], "norm_type": "rms", "num_attention_heads": 32,
        "num_experts": 64, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_shared_expert": [1, 1],
        "rms_norm_eps": 1e-5, "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0, "type": "dynamic"}, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "use_cla": false, "use_mixed_mlp_moe": true, "use_qk_norm": true, "vocab_size": 128_167})
}

/// The rotated elements of the first layer's heads.
fn rotated(architecture: &Architecture) -> usize {
    architecture.layers[0].attention.rope().map_or(0, moepress::architecture::Rope::dim)
}

#[test]
fn granite_minimax_and_hunyuan() {
    let architecture = read(&granite());
    assert_eq!(sizes(&architecture), [32, 32, 40, 8, 0]);
    let factors = [architecture.embedding_scale, architecture.residual_scale, architecture.head_scale];
    assert_eq!(factors, [12.0, 0.22, 1.0 / 6.0]);
    for (key, value) in
        [("embedding_multiplier", 1e300), ("residual_multiplier", 1e39), ("logits_scaling", 1e-300)]
    {
        refused(&with(&granite(), json!({key: value})), &format!("{key} gives a factor that is not finite"));
    }
    refused(&with(&granite(), json!({"logits_scaling": 0.0})), "logits_scaling is 0, expected more than 0");
    let shared = json!({"model_type": "granitemoeshared", "shared_intermediate_size": 1024});
    assert_eq!(sizes(&read(&with(&granite(), shared))), [32, 32, 40, 8, 1024]);

    let architecture = read(&minimax());
    assert_eq!((sizes(&architecture), rotated(&architecture)), ([62, 62, 256, 8, 0], 64));
    // 58 / 100 · 100 is less than 58.
    assert_eq!(rotated(&read(&with(&minimax(), json!({"head_dim": 100, "rotary_dim": 58})))), 58);
    assert_eq!(rotated(&read(&with(&minimax(), json!({"rotary_dim": 128})))), 128);
    for (change, expected) in [
        (json!({"attn_type_list": [1, 0, 1]}), "attn_type_list has layers without softmax attention"),
        (json!({"scoring_func": "softmax"}), "scoring_func is \"softmax\", only \"sigmoid\""),
        (json!({"use_routing_bias": false}), "use_routing_bias is false, only true is supported here"),
        (json!({"shared_intermediate_size": 64}), "shared_intermediate_size is 64, only 0"),
        (json!({"rotary_dim": 256}), "rotary_dim is 256, expected at most head_dim = 128"),
    ] {
        refused(&with(&minimax(), change), expected);
    }

    let architecture = read(&hunyuan());
    assert_eq!((sizes(&architecture), rotated(&architecture)), ([32, 32, 64, 8, 3072], 128));
    for (change, expected) in [
        (json!({"moe_topk": [8, 4]}), "moe_topk differs between layers"),
        (json!({"moe_intermediate_size": [64, 64]}), "moe_intermediate_size is 64, only 3072"),
        (json!({"use_cla": true}), "use_cla is true, only false"),
        (json!({"rope_scaling": {"type": "dynamic", "alpha": 0.5}}), "rope_scaling.alpha is 0.5"),
    ] {
        refused(&with(&hunyuan(), change), expected);
    }
}

/// The keys of transformers' class with the sizes of 26B-A4B; the published file was not at hand.
fn gemma4() -> Value {
    let mut kinds = vec!["sliding_attention"; 30];
    (5..30).step_by(6).for_each(|l| kinds[l] = "full_attention");
    json!({"architectures": ["Gemma4ForConditionalGeneration"], "audio_config": null, "image_token_id": 258_880,
        "model_type": "gemma4", "tie_word_embeddings": true, "vision_config": {"model_type": "gemma4_vision"},
        "text_config": {"attention_bias": false, "attention_k_eq_v": true, "enable_moe_block": true,
        "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2816, "hidden_size_per_layer_input": 0, "intermediate_size": 2112, "layer_types": kinds,
        "max_position_embeddings": 262_144, "model_type": "gemma4_text", "moe_intermediate_size": 704,
        "num_attention_heads": 16, "num_experts": 128, "num_global_key_value_heads": 2, "num_hidden_layers": 30,
        "num_key_value_heads": 8, "num_kv_shared_layers": 0, "rms_norm_eps": 1e-6, "rope_parameters": {"full_attention":
        {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"}, "sliding_attention":
        {"rope_theta": 1e4, "rope_type": "default"}}, "sliding_window": 1024, "tie_word_embeddings": true,
        "top_k_experts": 8, "use_bidirectional_attention": "vision", "use_double_wide_mlp": false,
        "vocab_size": 262_144, "vocab_size_per_layer_input": 262_144}})
}

/// Grouped attention of layer `l`.
fn grouped(architecture: &Architecture, l: usize) -> &GroupedAttention {
    let AttentionSpec::Grouped(attention) = &architecture.layers[l].attention else { panic!("layer {l}") };
    attention
}

#[test]
fn gemma_4() {
    let text =
        |changes: Value| with(&gemma4(), json!({"text_config": with(&gemma4()["text_config"], changes)}));
    let architecture = read(&gemma4());
    assert_eq!(sizes(&architecture), [30, 30, 128, 8, 2112]);
    let heads = |a: &Architecture, l: usize| {
        let attention = grouped(a, l);
        (attention.head_dim, attention.kv_heads, attention.span, attention.keys_as_values)
    };
    assert_eq!(heads(&architecture, 4), (256, 8, Span::Window(1024), false));
    assert_eq!(heads(&architecture, 5), (512, 2, Span::Full, true));
    // A quarter of 256 pairs turns, with the frequencies of all.
    let frequencies = &grouped(&architecture, 5).rope.as_ref().unwrap().inverse_frequencies;
    assert_eq!(frequencies.iter().filter(|f| **f != 0.0).count(), 64);
    assert!((f64::from(frequencies[63]) / 1e6f64.powf(-126.0 / 512.0) - 1.0).abs() < 1e-6);

    // Without sections of their own, the same rotations; the last layer attends to everything; keys of their own.
    let kinds = vec!["sliding_attention"; 30];
    let plain = read(&text(
        json!({"rope_parameters": null, "layer_types": kinds, "attention_k_eq_v": false, "tie_word_embeddings": null}),
    ));
    assert_eq!(grouped(&plain, 29).rope, grouped(&architecture, 29).rope);
    assert_eq!(grouped(&plain, 0).rope, grouped(&architecture, 0).rope);
    assert_eq!(heads(&plain, 29), (512, 8, Span::Full, false));
    assert!(plain.tied_embeddings);
    // As transformers 5 writes it.
    let listed = json!({"global_head_dim": null, "per_layer_config": {"5": {"head_dim": 128, "num_key_value_heads": 4}}});
    assert_eq!(heads(&read(&text(listed)), 5), (128, 4, Span::Full, true));

    for (change, expected) in [
        (json!({"enable_moe_block": false}), "enable_moe_block is not true: a model without experts"),
        (json!({"hidden_size_per_layer_input": null}), "hidden_size_per_layer_input is not 0"),
        (json!({"num_kv_shared_layers": 10}), "num_kv_shared_layers is 10, only 0 is supported here"),
        (
            json!({"use_bidirectional_attention": "all"}),
            "use_bidirectional_attention is not \"vision\" or null",
        ),
        (json!({"hidden_activation": "silu"}), "hidden_activation is \"silu\", only \"gelu_pytorch_tanh\""),
        (json!({"final_logit_softcapping": -1.0}), "final_logit_softcapping is -1, expected more than 0"),
        (
            json!({"per_layer_config": {"3": {"sliding_window": 4}}}),
            "per_layer_config.3.sliding_window is not supported",
        ),
        (json!({"global_head_dim": 511}), "head_dim gives 511 rotated elements, expected an even number"),
    ] {
        refused(&text(change), expected);
    }
    refused(&json!({"model_type": "gemma4"}), "text_config is missing");
}

#[test]
fn command_and_dbrx() {
    // The keys of transformers' class; the published file was not at hand.
    let command = json!({"architectures": ["Cohere2MoeForCausalLM"], "attention_bias": false,
        "expert_selection_fn": "sigmoid", "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 2048, "layer_norm_eps": 1e-5, "logit_scale": 0.25,
        "max_position_embeddings": 131_072, "model_type": "cohere2_moe", "norm_topk_prob": true,
        "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 33,
        "num_key_value_heads": 8, "num_shared_experts": 2, "prefix_dense_intermediate_size": 16384,
        "prefix_dense_sliding_window_pattern": 1, "rope_theta": 50000, "sliding_window": 4096,
        "sliding_window_pattern": 4, "vocab_size": 256_000});
    let architecture = read(&command);
    assert_eq!(sizes(&architecture), [33, 32, 128, 8, 4096]);
    // The dense layer rotates all the same; behind it every fourth layer has no positions.
    let kinds = |l: usize| (grouped(&architecture, l).span, grouped(&architecture, l).rope.is_some());
    assert_eq!(kinds(0), (Span::Full, true));
    assert_eq!([1, 3].map(kinds), [(Span::Window(4096), true); 2]);
    assert_eq!(kinds(4), (Span::Full, false));
    for (change, expected) in [
        (json!({"expert_selection_fn": "relu"}), "expert_selection_fn is neither `softmax` nor `sigmoid`"),
        (
            json!({"shared_expert_combination_strategy": "max"}),
            "shared_expert_combination_strategy is neither `average` nor `sum`",
        ),
        (json!({"sliding_window": null}), "sliding_window is null, expected a number"),
        (json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\""),
    ] {
        refused(&with(&command, change), expected);
    }

    let dbrx = json!({"architectures": ["DbrxForCausalLM"], "attn_config": {"clip_qkv": 8, "kv_n_heads": 8,
        "model_type": "", "rope_theta": 500_000}, "d_model": 6144, "emb_pdrop": 0.0, "ffn_config": {"ffn_hidden_size":
        10752, "model_type": "", "moe_jitter_eps": 0.01, "moe_loss_weight": 0.05, "moe_num_experts": 16, "moe_top_k": 4},
        "max_seq_len": 32768, "model_type": "dbrx", "n_heads": 48, "n_layers": 40, "resid_pdrop": 0.0,
        "tie_word_embeddings": false, "vocab_size": 100_352});
    let architecture = read(&dbrx);
    assert_eq!((sizes(&architecture), architecture.max_positions), ([40, 40, 16, 4, 0], 32768));
    let attention = grouped(&architecture, 0);
    assert_eq!((attention.kv_heads, attention.head_dim, attention.clip), (8, 128, Some(8.0)));
    // The base that the model was trained with, whatever transformers writes beside it.
    let base = |a: &Architecture| f64::from(grouped(a, 0).rope.as_ref().unwrap().inverse_frequencies[63]);
    let written = with(&dbrx, json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}));
    for config in [&dbrx, &written] {
        assert!((base(&read(config)) / 5e5f64.powf(-126.0 / 128.0) - 1.0).abs() < 1e-6);
    }
    let part = |key: &str, changes: Value| with(&dbrx, json!({key: with(&dbrx[key], changes)}));
    refused(&part("ffn_config", json!({"ffn_act_fn": {"name": "gelu"}})), "name is \"gelu\", only \"silu\"");
    let norm = json!({"moe_normalize_expert_weights": 2.0});
    refused(&part("ffn_config", norm), "moe_normalize_expert_weights is 2.0, only 1 is supported here");
    refused(&part("attn_config", json!({"clip_qkv": -8})), "clip_qkv is -8, expected more than 0");
    refused(&with(&dbrx, json!({"ffn_config": null})), "ffn_config is missing");
}

#[test]
fn relatives_of_deepseek_and_glm() {
    let lite = with(
        &deepseek_v3(),
        json!({"model_type": "glm4_moe_lite", "n_group": 1, "topk_group": 1, "n_routed_experts": 64,
        "num_experts_per_tok": 4, "first_k_dense_replace": 1, "rope_scaling": null}),
    );
    assert_eq!(sizes(&read(&lite)), [61, 60, 64, 4, 2048]);
    refused(
        &with(&lite, json!({"mlp_layer_types": ["dense"]})),
        "mlp_layer_types has 1 entries, expected 61",
    );
    refused(&with(&lite, json!({"partial_rotary_factor": 0.5})), "partial_rotary_factor is 0.5, only 1");
    // An indexer chooses among more tokens than it takes only in longer texts.
    for family in ["deepseek_v32", "glm_moe_dsa"] {
        let sparse =
            json!({"model_type": family, "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128});
        let sparse = with(&deepseek_v3(), sparse);
        assert_eq!((sizes(&read(&sparse)), read(&sparse).max_positions), ([61, 58, 256, 8, 2048], 2048));
        refused(&with(&sparse, json!({"rope_interleave": false})), "rope_interleave is false");
    }
    let glm = json!({"model_type": "glm4v_moe", "text_config": {"hidden_size": 64, "num_hidden_layers": 2}});
    refused(&glm, "num_experts is missing");
    refused(&json!({"model_type": "qwen3_vl_moe"}), "text_config is missing");
    let dense =
        json!({"model_type": "mistral3", "text_config": {"model_type": "mistral", "hidden_size": 64}});
    refused(&dense, "model_type is \"mistral\", only \"mistral4\" is supported here");
}

#[test]
fn other_quantisation_is_named_with_what_would_do() {
    let packed = |config: &Value, section: Value| with(config, json!({"quantization_config": section}));
    for method in ["gptq", "awq", "bitsandbytes", "modelopt", "fbgemm_fp8"] {
        let expected = format!(
            "quantization_config.quant_method is `{method}`; known: fp8, mxfp4, compressed-tensors with FP8 or packed four-bit \
             weights; take"
        );
        refused(&packed(&mixtral(), json!({"quant_method": method, "bits": 4})), &expected);
    }
    let of_matrices = packed(&mixtral(), json!({"quant_method": "fp8", "activation_scheme": "static"}));
    assert_eq!(read(&of_matrices).packing, Some(Packing::Fp8 { block: None }));
    let group = |weights: Value| json!({"group": {"targets": ["Linear"], "weights": weights}});
    let compressed = |groups: Value| {
        packed(&mixtral(), json!({"quant_method": "compressed-tensors", "config_groups": groups}))
    };
    let float = json!({"num_bits": 8, "type": "float", "strategy": "channel"});
    assert_eq!(read(&compressed(group(float.clone()))).packing, Some(Packing::Fp8 { block: None }));
    let blocks = with(&float, json!({"strategy": "block", "block_structure": [128, 128]}));
    assert_eq!(
        read(&compressed(group(blocks.clone()))).packing,
        Some(Packing::Fp8 { block: Some([128, 128]) })
    );
    let both = json!({"a": {"weights": float}, "b": {"weights": blocks}});
    refused(&compressed(both), "has groups with scales of different kinds");
    let whole = json!({"num_bits": 8, "type": "int", "strategy": "channel"});
    refused(
        &compressed(group(whole)),
        "config_groups has 8-bit weights of type int by channel; known: 8-bit float",
    );
    let four = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": true,
        "actorder": null});
    let packed_as = |weights: &Value, format: &str| {
        let section = json!({"quant_method": "compressed-tensors", "config_groups": group(weights.clone()),
            "format": format});
        packed(&mixtral(), section)
    };
    let of = |group| Some(Packing::Int4 { group });
    assert_eq!(read(&packed_as(&four, "pack-quantized")).packing, of(Some(32)));
    let rows = with(&four, json!({"strategy": "channel", "actorder": "static"}));
    assert_eq!(read(&packed_as(&rows, "pack-quantized")).packing, of(None));
    refused(&packed_as(&four, "int-quantized"), "format is \"int-quantized\", only \"pack-quantized\"");
    for (change, message) in [
        (json!({"symmetric": false}), "symmetric is false, only true"),
        (
            json!({"actorder": "group"}),
            "config_groups has weights in another order of columns (actorder); take",
        ),
        (json!({"group_size": 33}), "config_groups has a group_size of 33, expected an even number"),
        (json!({"group_size": 0}), "group_size is 0"),
        (json!({"group_size": null}), "group_size is missing"),
    ] {
        refused(&packed_as(&with(&four, change), "pack-quantized"), message);
    }
    refused(&compressed(json!({})), "config_groups is empty");
    refused(&compressed(json!({"group": {}})), "config_groups has a group without weights");
    let text = with(&llama4()["text_config"], json!({"quantization_config": {"quant_method": "awq"}}));
    refused(&with(&llama4(), json!({"text_config": text})), "quant_method is `awq`");
}

#[test]
fn what_would_change_the_forward_pass_is_refused() {
    let scaled = |scaling: Value| with(&mixtral(), json!({"rope_scaling": scaling}));
    refused(&scaled(json!({"rope_type": "axial", "factor": 2.0})), "rope_type is `axial`; known: default");
    let nested = json!({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}});
    refused(&with(&mixtral(), nested), "rope_parameters.full_attention is an object");
    refused(&with(&mixtral(), json!({"hidden_act": "gelu"})), "hidden_act is \"gelu\"");
    let dynamic = json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2});
    refused(&with(&mixtral(), dynamic), "dynamic scaling needs 4 or more");
    let linear = json!({"rope_scaling": {"type": "linear", "factor": 2.0}, "model_type": "phimoe"});
    refused(&with(&mixtral(), linear), "is `linear`; known for this family: default, longrope");
    refused(&with(&deepseek_v3(), json!({"scoring_func": "softmax"})), "scoring_func is \"softmax\"");
    refused(&with(&mixtral(), json!({"model_type": "mamba"})), "`mamba` is not supported; known: ");
}

/// Keys of newer files that say what others said before, in the configs of the small models.
#[test]
fn keys_that_say_the_same_in_another_way() {
    let config = |name: &str| -> Value {
        let path = format!("{}/tests/data/{name}/config.json", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    // A window that is counted without the token itself.
    let mimo = config("mimo_v2_flash");
    let window = |changes: Value| grouped(&read(&with(&mimo, changes)), 1).span;
    assert_eq!(window(json!({})), Span::Window(8));
    assert_eq!(window(json!({"sliding_window_size": 8})), Span::Window(9));
    assert_eq!(window(json!({"sliding_window": null})), Span::Window(129));
    let sparse = |config: &Value| read(config).moe_layers().map(|(l, _)| l).collect::<Vec<_>>();
    let axk1 = config("axk1");
    assert_eq!(sparse(&axk1), [1]);
    assert_eq!(sparse(&with(&axk1, json!({"mlp_layer_types": ["sparse", "sparse"]}))), [0, 1]);
    let slope = |config: &Value| match &read(config).layers[0].feed_forward {
        FeedForwardSpec::Moe(moe) => moe.activation,
        _ => unreachable!("a layer with experts"),
    };
    let clamped = |slope| Activation::ClampedSwiGlu { limit: 7.0, slope };
    let gpt_oss = with(&config("gpt_oss"), json!({"swiglu_limit": 7.0}));
    assert_eq!(slope(&gpt_oss), clamped(1.702));
    assert_eq!(slope(&with(&gpt_oss, json!({"swiglu_alpha": 1.0}))), clamped(1.0));
    let mut glm = config("glm4v_moe");
    glm["tie_word_embeddings"] = Value::Null;
    assert!(!read(&glm).tied_embeddings);
    glm["text_config"]["tie_word_embeddings"] = json!(true);
    assert!(read(&glm).tied_embeddings);
}
