use super::super::Architecture;
use super::{Config, Error, FAMILIES, Names, Result, TEXT_SECTION, as_language_model, required_section};

/// Kimi-K2.5 and K2.6 (arXiv 2602.02276) around Kimi-K2.
pub(super) fn kimi_k25(config: &Config) -> Result<Architecture> {
    language_model(config, "kimi_k25", TEXT_SECTION, Some("deepseek_v3"), Some(true))
}

/// Kimi-VL (arXiv 2504.07491) around Moonlight.
pub(super) fn kimi_vl(config: &Config) -> Result<Architecture> {
    language_model(config, "kimi_vl", TEXT_SECTION, Some("deepseek_v3"), None)
}

/// InternVL 3.5 (arXiv 2508.18265) as published.
pub(super) fn internvl_chat(config: &Config) -> Result<Architecture> {
    language_model(config, "internvl_chat", &["llm_config"], None, None)
}

/// InternVL 3.5 as transformers has it.
pub(super) fn internvl(config: &Config) -> Result<Architecture> {
    language_model(config, "internvl", TEXT_SECTION, None, None)
}

/// The language model within a model of text and images: of the family that `section` of the config says, or where it says
/// none, of `default`. Whether the head is the embedding table where the config does not say is for `tied` to say, or else
/// for the language model.
fn language_model(
    config: &Config,
    family: &'static str,
    section: &'static [&'static str],
    default: Option<&str>,
    tied: Option<bool>,
) -> Result<Architecture> {
    let text = required_section(config, section[0])?;
    let inner = match default {
        Some(default) if !text.mentions("model_type") => default.to_owned(),
        _ => text.string("model_type")?,
    };
    let read = FAMILIES.iter().find(|(name, _)| *name == inner).map(|(_, read)| read);
    let mut architecture =
        read.map(|read| read(&text)).transpose()?.filter(has_usual_names).ok_or_else(|| {
            let what =
                format!("is `{inner}`, which is no language model with experts that is known within others");
            Error::invalid(&format!("{}.model_type", section[0]), what)
        })?;
    architecture.family = family;
    architecture.names = as_language_model(architecture.names);
    architecture.config_section = section;
    let tied = tied.unwrap_or(architecture.tied_embeddings);
    architecture.tied_embeddings = config.flag_or("tie_word_embeddings", tied)?;
    Ok(architecture)
}

/// Whether its tensors are called so that a prefix makes them those of a part, and its config has no sections.
fn has_usual_names(architecture: &Architecture) -> bool {
    let (Names { model, head, t5, .. }, usual) = (&architecture.names, Names::default());
    (*model, *head, t5) == (usual.model, usual.head, &None) && architecture.config_section.is_empty()
}
