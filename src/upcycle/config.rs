//! What the config of a dense checkpoint means, with the defaults of its family written out.

use serde_json::{Map, Value, json};

use super::{Options, Target};

/// A family of dense models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Mistral,
    Cohere,
}

impl Family {
    const ALL: [Family; 3] = [Family::Llama, Family::Mistral, Family::Cohere];

    /// As `model_type` calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Cohere => "cohere",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Family::ALL.into_iter().find(|family| family.name() == name)
    }

    /// Whether a MoE model of this kind computes what one of this family does beside its MLPs.
    fn fits(self, target: Target) -> bool {
        target == Target::Bam || self != Family::Cohere
    }

    /// Norms of a layer.
    pub(super) fn norms(self) -> &'static [&'static str] {
        match self {
            // Attention and MLP read the same.
            Family::Cohere => &["input_layernorm"],
            _ => &["input_layernorm", "post_attention_layernorm"],
        }
    }

    /// What an absent key means in transformers, where it may be absent.
    fn defaults(self) -> Vec<(&'static str, Value)> {
        let mut defaults = vec![
            ("hidden_act", json!("silu")),
            ("attention_bias", json!(false)),
            ("mlp_bias", json!(false)),
            ("rope_scaling", Value::Null),
            ("rope_parameters", Value::Null),
        ];
        defaults.extend(match self {
            Family::Llama => vec![
                ("max_position_embeddings", json!(2048)),
                ("rms_norm_eps", json!(1e-6)),
                ("tie_word_embeddings", json!(false)),
            ],
            Family::Mistral => vec![
                ("max_position_embeddings", json!(131_072)),
                ("rms_norm_eps", json!(1e-6)),
                ("tie_word_embeddings", json!(false)),
                ("sliding_window", json!(4096)),
            ],
            Family::Cohere => vec![
                ("max_position_embeddings", json!(8192)),
                ("layer_norm_eps", json!(1e-5)),
                ("tie_word_embeddings", json!(true)),
                ("logit_scale", json!(0.0625)),
                ("use_qk_norm", json!(false)),
            ],
        });
        defaults
    }
}

/// Sizes that every config says, and the largest that is believed.
const SIZES: [(&str, u64); 5] = [
    ("vocab_size", 1 << 24),
    ("hidden_size", 1 << 24),
    ("intermediate_size", 1 << 24),
    ("num_hidden_layers", 1 << 12),
    ("num_attention_heads", 1 << 24),
];

/// Keys that say nothing about the forward pass and are taken over from the first config.
const COMPANIONS: [&str; 7] =
    ["bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", SPREAD, "use_cache"];

/// Standard deviation of new weights.
const SPREAD: &str = "initializer_range";

/// The config of a dense checkpoint.
#[derive(Clone, Debug)]
pub(super) struct DenseConfig {
    pub(super) family: Family,
    /// Everything that its forward pass depends on.
    meaning: Map<String, Value>,
    companions: Map<String, Value>,
}

impl DenseConfig {
    /// Reads the text of a `config.json`, or says what is wrong with it for `target`.
    pub(super) fn parse(text: &str, target: Target) -> std::result::Result<Self, String> {
        let config = match crate::architecture::parse_json(text) {
            Ok(Value::Object(config)) => config,
            Ok(_) => return Err("is not a JSON object".into()),
            Err(e) => return Err(format!("is not valid JSON: {e}")),
        };
        let fitting = || Family::ALL.into_iter().filter(|family| family.fits(target));
        let family = config.get("model_type").and_then(Value::as_str).and_then(Family::named);
        let Some(family) = family.filter(|family| family.fits(target)) else {
            let known = fitting().map(Family::name).collect::<Vec<_>>().join(", ");
            let found = config.get("model_type").unwrap_or(&Value::Null);
            return Err(format!("model_type is {found}, expected one of {known}"));
        };
        if config.get("quantization_config").is_some_and(|v| !v.is_null()) {
            return Err("quantization_config: packed weights cannot be averaged; unpack them first".into());
        }
        let stated = |key: &str| config.get(key).filter(|value| !value.is_null());
        let mut meaning = Map::new();
        for (key, largest) in SIZES {
            let value = stated(key).filter(|v| v.as_u64().is_some_and(|v| (1..=largest).contains(&v)));
            let value =
                value.ok_or_else(|| format!("{key} is missing, or no whole number from 1 to {largest}"))?;
            meaning.insert(key.into(), value.clone());
        }
        for (key, default) in family.defaults() {
            // A `null` is a default of its own where there is a number else.
            let value = config.get(key).cloned().unwrap_or(default.clone());
            let value = if value.is_null() && key != "sliding_window" { default } else { value };
            meaning.insert(key.into(), value);
        }
        let size = |key: &str| meaning[key].as_u64().unwrap_or_default();
        let (hidden, heads) = (size("hidden_size"), size("num_attention_heads"));
        let kv_heads = match config.get("num_key_value_heads") {
            None if family == Family::Mistral => 8,
            None | Some(Value::Null) => heads,
            Some(value) => value.as_u64().unwrap_or_default(),
        };
        let head_dim = match stated("head_dim") {
            None => hidden / heads,
            Some(value) => value.as_u64().unwrap_or_default(),
        };
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || head_dim == 0 || head_dim > 1 << 24 {
            return Err("num_attention_heads, num_key_value_heads and head_dim do not go together".into());
        }
        meaning.insert("num_key_value_heads".into(), kv_heads.into());
        meaning.insert("head_dim".into(), head_dim.into());
        if meaning["rope_parameters"].is_null() {
            // Of Cohere, absent has meant 10000 and 500000 in transformers.
            let default = (family != Family::Cohere).then(|| json!(10_000.0));
            let theta = stated("rope_theta").cloned().or(default);
            meaning.insert("rope_theta".into(), theta.ok_or("rope_theta is missing")?);
        }
        for (key, expected) in [
            ("hidden_act", json!("silu")),
            ("attention_bias", json!(false)),
            ("mlp_bias", json!(false)),
            ("use_qk_norm", json!(false)),
        ] {
            match meaning.get(key) {
                Some(value) if *value != expected => {
                    let target = target.name();
                    return Err(format!("{key} is {value}, but a {target} checkpoint holds {expected} only"));
                }
                _ => {}
            }
        }
        if stated(SPREAD).is_some_and(|v| !v.as_f64().is_some_and(|v| (0.0..=1.0).contains(&v))) {
            return Err(format!("{SPREAD} is {}, expected a number from 0 to 1", config[SPREAD]));
        }
        let companions =
            COMPANIONS.into_iter().filter_map(|key| Some((key.into(), config.get(key)?.clone())));
        Ok(DenseConfig { family, meaning, companions: companions.collect() })
    }

    /// What this config says otherwise than `first`, if anything.
    pub(super) fn difference(&self, first: &Self) -> Option<String> {
        if self.family != first.family {
            return Some(format!("model_type is {}, but {}", self.family.name(), first.family.name()));
        }
        let other = |(key, value): (&String, &Value)| match first.meaning.get(key) {
            Some(expected)
                if expected == value || expected.as_f64().is_some_and(|e| Some(e) == value.as_f64()) =>
            {
                None
            }
            Some(expected) => Some(format!("{key} is {value}, but {expected}")),
            None => Some(format!("says {key}, but not")),
        };
        self.meaning.iter().find_map(other)
    }

    /// A size of it.
    pub(super) fn size(&self, key: &str) -> usize {
        self.meaning[key].as_u64().unwrap_or_default() as usize
    }

    /// Whether the output head is the embedding table.
    pub(super) fn is_tied(&self) -> bool {
        self.meaning["tie_word_embeddings"] == json!(true)
    }

    /// Standard deviation of new weights.
    pub(super) fn initializer_range(&self) -> f64 {
        self.companions.get(SPREAD).and_then(Value::as_f64).unwrap_or(0.02)
    }

    /// The `config.json` of the MoE checkpoint.
    pub(super) fn of_experts(&self, experts: usize, options: &Options) -> String {
        let mut config = self.companions.clone();
        config.extend(self.meaning.clone());
        for key in ["attention_bias", "mlp_bias", "use_qk_norm"] {
            config.remove(key);
        }
        config.retain(|_, value| !value.is_null());
        config.insert("num_local_experts".into(), experts.into());
        config.insert("num_experts_per_tok".into(), options.top_k.into());
        config.insert("model_type".into(), options.target.name().into());
        match options.target {
            Target::Mixtral => {
                config.insert("architectures".into(), json!(["MixtralForCausalLM"]));
                config.entry("sliding_window").or_insert(Value::Null);
            }
            Target::Bam => {
                config.insert("dense_model_type".into(), self.family.name().into());
                config.insert("num_attention_experts".into(), experts.into());
                config.insert("shared_key_values".into(), options.shared_key_values.into());
            }
        }
        serde_json::to_string_pretty(&Value::Object(config)).unwrap_or_default() + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4"#;

    fn parse(rest: &str) -> std::result::Result<DenseConfig, String> {
        DenseConfig::parse(&format!("{LLAMA}{rest}}}"), Target::Mixtral)
    }

    #[test]
    fn silent_defaults_are_those_of_the_dense_family() {
        let config = parse("").unwrap();
        let text = config.of_experts(3, &Options::new(Target::Mixtral));
        let written: Value = serde_json::from_str(&text).unwrap();
        // Mixtral's own would be 8, 1e-5 and 1e6.
        assert_eq!(written["num_key_value_heads"], 4);
        assert_eq!(written["rms_norm_eps"], 1e-6);
        assert_eq!(written["rope_theta"], 1e4);
        assert_eq!(written["sliding_window"], Value::Null);
        assert_eq!((&written["num_local_experts"], &written["num_experts_per_tok"]), (&json!(3), &json!(2)));
    }

    #[test]
    fn what_is_written_out_is_no_difference_and_another_value_is() {
        let plain = parse("").unwrap();
        assert_eq!(parse(r#", "rope_theta": 10000, "head_dim": 8"#).unwrap().difference(&plain), None);
        let other = parse(r#", "rope_theta": 500000.0"#).unwrap();
        assert_eq!(other.difference(&plain).unwrap(), "rope_theta is 500000.0, but 10000.0");
        assert!(parse(r#", "rope_parameters": {"rope_theta": 1e4}"#).unwrap().difference(&plain).is_some());
    }

    #[test]
    fn what_the_result_has_no_place_for_is_refused() {
        for (rest, word) in [
            (r#", "attention_bias": true"#, "attention_bias"),
            (r#", "hidden_act": "gelu""#, "hidden_act"),
            (r#", "num_key_value_heads": 3"#, "num_key_value_heads"),
            (r#", "num_key_value_heads": 0"#, "num_key_value_heads"),
            (r#", "num_hidden_layers": 1000000"#, "num_hidden_layers"),
            (r#", "initializer_range": 1e300"#, "initializer_range"),
            (r#", "head_dim": 1e300"#, "head_dim"),
            (r#", "quantization_config": {"bits": 4}"#, "quantization_config"),
        ] {
            let error = parse(rest).unwrap_err();
            assert!(error.contains(word), "{rest}: {error}");
        }
        let cohere = LLAMA.replace("llama", "cohere") + "}";
        assert!(DenseConfig::parse(&cohere, Target::Mixtral).unwrap_err().contains("llama, mistral"));
        assert!(DenseConfig::parse(&cohere, Target::Bam).unwrap_err().contains("rope_theta"));
        let cohere = cohere.replace('}', r#", "rope_theta": 8000000}"#);
        assert!(DenseConfig::parse(&cohere, Target::Bam).is_ok());
        assert!(DenseConfig::parse("[]", Target::Bam).is_err());
        assert!(DenseConfig::parse(r#"{"model_type": "llama"}"#, Target::Bam).is_err());
    }
}
