//! Checkpoints and tokens made up on the spot.

use std::collections::BTreeMap;
use std::path::Path;

use moepress::checkpoint::{Dtype, Entry, Tensor, write_safetensors};
use moepress::tokens::{SourceFile, Windows, write_token_file};

/// Sizes of a generated model.
pub struct Sizes {
    pub layers: usize,
    pub hidden: usize,
    pub width: usize,
    pub experts: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes { layers: 6, hidden: 128, width: 128, experts: 8 }
    }
}

const VOCABULARY: usize = 512;
const HEADS: usize = 4;

/// Writes a random mixtral checkpoint in bf16 with 512 tokens and positions.
pub fn mixtral(dir: &Path, sizes: &Sizes) {
    let Sizes { layers, hidden, width, experts } = *sizes;
    std::fs::create_dir_all(dir).unwrap();
    let config = serde_json::json!({
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers, "num_local_experts": experts,
        "num_experts_per_tok": 2, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": 512, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut state = 1u64;
    let mut random = move |name: String, shape: Vec<usize>, scale: f32| {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
            })
            .collect();
        Tensor::from_f32(name, Dtype::BF16, shape, &values)
    };
    let ones = |name: String| Tensor::from_f32(name, Dtype::BF16, vec![hidden], &vec![1.0; hidden]);
    let scale = 1.7 / (hidden as f32).sqrt();
    let mut tensors = vec![
        random("model.embed_tokens.weight".into(), vec![VOCABULARY, hidden], 1.7),
        random("lm_head.weight".into(), vec![VOCABULARY, hidden], scale),
        ones("model.norm.weight".into()),
    ];
    for l in 0..layers {
        let prefix = format!("model.layers.{l}.");
        tensors.push(ones(format!("{prefix}input_layernorm.weight")));
        tensors.push(ones(format!("{prefix}post_attention_layernorm.weight")));
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            tensors.push(random(format!("{prefix}self_attn.{name}.weight"), vec![hidden, hidden], scale));
        }
        tensors.push(random(format!("{prefix}block_sparse_moe.gate.weight"), vec![experts, hidden], scale));
        for e in 0..experts {
            for (name, shape) in [("w1", [width, hidden]), ("w3", [width, hidden]), ("w2", [hidden, width])] {
                let name = format!("{prefix}block_sparse_moe.experts.{e}.{name}.weight");
                tensors.push(random(name, shape.to_vec(), scale));
            }
        }
    }
    let entries = tensors.iter().map(Entry::tensor).collect();
    write_safetensors(&dir.join("model.safetensors"), &BTreeMap::new(), entries).unwrap();
}

/// Writes a token file of `count` windows with ids below `vocabulary`.
pub fn tokens(path: &Path, count: usize, length: usize, vocabulary: u32) {
    let id = |i: u32| (i.wrapping_mul(2_654_435_761) >> 12) % vocabulary;
    let windows = Windows {
        ids: (0..(count * length) as u32).map(id).collect(),
        mask: None,
        count,
        length,
        files: vec![SourceFile { name: "generated".into(), windows: count }],
        decoder: None,
    };
    write_token_file(path, &windows).unwrap();
}
