//! `moepress inspect`: what a checkpoint is.

use std::fmt::Write as _;
use std::path::PathBuf;

use moepress::architecture::{Skip, SkipThreshold};
use moepress::checkpoint::Checkpoint;
use moepress::model::{AttentionSummary, Inspection, MoeSummary, RouterSummary, StateSummary, inspect};

use super::common::OutputArgs;
use super::failure::Failure;
use super::output;
use super::table::{Align, Table};
use super::units::{bytes, counted, parameters, percent};

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Checkpoint folder
    model: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let inspection = inspect(&Checkpoint::open(&self.model)?)?;
        if self.output.json { output::json(&inspection) } else { output::text(&page(&inspection)) }
    }
}

/// The page for people.
fn page(model: &Inspection) -> String {
    let total = parameters(model.parameters.total);
    let active = parameters(model.parameters.active);
    let mut page = format!("{}: {total} parameters, {active} active per token\n\n", model.family);
    for (key, value) in facts(model) {
        let _ = writeln!(page, "{key:<11} {value}");
    }
    if !model.moe_layers.is_empty() {
        let _ = write!(page, "\n{}", layer_table(&model.moe_layers));
    }
    let _ = write!(page, "\n{}", size_table(model));
    page
}

fn facts(model: &Inspection) -> Vec<(&'static str, String)> {
    let layout = match model.layout {
        "moepress" => "moepress (experts as moepress.json lists them)",
        _ => "Hugging Face",
    };
    let dtypes: Vec<String> = match model.dtypes.len() {
        1 => model.dtypes.keys().cloned().collect(),
        _ => model.dtypes.iter().map(|(dtype, n)| format!("{} {dtype}", parameters(*n))).collect(),
    };
    let mut facts = vec![
        ("layout", format!("{layout}, {}", dtypes.join(" + "))),
        ("attention", mixers(model)),
        ("layers", layers(model)),
        ("hidden", model.hidden_size.to_string()),
        ("context", model.max_positions.map_or("any length".into(), |most| counted(most, "token"))),
        ("vocabulary", counted(model.vocabulary, "token")),
    ];
    if let Some(rule) = &model.router {
        facts.push(("router", router(rule, &model.moe_layers)));
    }
    facts
}

/// What mixes tokens: attention, what takes its place, or some layers of both.
fn mixers(model: &Inspection) -> String {
    let attention = model.attention.as_ref().map(|a| attention(a, model.layers));
    let Some(other) = model.in_place_of_attention else { return attention.unwrap_or_default() };
    let (count, mut text) = match other {
        StateSummary::GatedDelta { layers, key_heads, value_heads, key_dim, value_dim, kernel } => {
            let heads = counted(value_heads, "head");
            let keys = counted(key_heads, "key head");
            let text = format!(
                "gated delta rule, {heads} of {key_dim}×{value_dim} on {keys}, convolution of {kernel}"
            );
            (layers, text)
        }
        StateSummary::ShortConvolution { layers, kernel } => {
            (layers, format!("gated convolution of {kernel}"))
        }
        StateSummary::Mamba { layers, width, state_dim, kernel } => {
            (layers, format!("Mamba, {} of {state_dim}, convolution of {kernel}", counted(width, "channel")))
        }
        StateSummary::Mamba2 { layers, heads, head_dim, state_dim, groups, kernel } => {
            let (heads, groups) = (counted(heads, "head"), counted(groups, "group"));
            let text =
                format!("Mamba-2, {heads} of {state_dim}×{head_dim} in {groups}, convolution of {kernel}");
            (layers, text)
        }
    };
    if let Some(attention) = attention {
        let alone = model.half_layers.map_or(0, |half| half.feed_forward);
        let attending = match model.layers - count - alone {
            _ if alone == 0 => "else".into(),
            layers => format!("in {}", counted(layers, "layer")),
        };
        let _ = write!(text, " in {}; {attending} {attention}", counted(count, "layer"));
    }
    text
}

fn attention(attention: &AttentionSummary, layers: usize) -> String {
    match attention {
        AttentionSummary::Grouped { heads, kv_heads, head_dim, window, sliding_layers, chunk, experts } => {
            let mut text = if heads == kv_heads {
                format!("multi-head, {} of width {head_dim}", counted(*heads, "head"))
            } else {
                let keys = counted(*kv_heads, "key head");
                format!("grouped-query, {} of width {head_dim} on {keys}", counted(*heads, "head"))
            };
            if let Some(window) = window {
                let _ = write!(text, ", sliding window of {window}");
                if *sliding_layers < layers {
                    let _ = write!(text, " in {}", counted(*sliding_layers, "layer"));
                }
            }
            if let Some(chunk) = chunk {
                let _ = write!(text, ", within chunks of {chunk}");
            }
            if let Some(experts) = experts {
                let _ = write!(text, ", of {experts} experts that are mixed");
            }
            text
        }
        AttentionSummary::Latent { heads, latent_dim, query_rank, query_dim, value_dim } => {
            let query = query_rank.map_or_else(String::new, |rank| format!(", query rank {rank}"));
            let heads = counted(*heads, "head");
            format!("multi-head latent, {heads} of width {query_dim}/{value_dim}, latent {latent_dim}{query}")
        }
    }
}

fn layers(model: &Inspection) -> String {
    let (all, moe) = (model.layers, model.moe_layers.len());
    let mixing = model.half_layers.map_or(0, |half| half.attention);
    let text = match all - moe - mixing {
        dense if mixing > 0 => {
            format!("{all}, {moe} with experts, {dense} dense and {mixing} without a feed-forward part")
        }
        0 => format!("{all}, all with experts"),
        dense if moe == 0 => format!("{dense}, none with experts"),
        dense => format!("{all}, {moe} with experts and {dense} dense"),
    };
    match model.encoder_layers {
        None => text,
        Some(encoder) => format!("{text}; 0 to {} are the encoder's", encoder - 1),
    }
}

/// The routing rule in words.
fn router(rule: &RouterSummary, layers: &[MoeSummary]) -> String {
    let experts = range(layers.iter().map(|l| l.experts));
    let top_k = range(layers.iter().map(|l| l.top_k));
    let mut text = format!("{} over {experts} experts", rule.scores);
    if let Some([count, kept]) = rule.groups {
        let _ = write!(text, ", group-limited: {kept} of {count} groups");
    }
    let _ = write!(text, ", top {top_k}, {}renormalised", if rule.renormalised { "" } else { "not " });
    if rule.scale.to_bits() != 1f32.to_bits() {
        let _ = write!(text, ", times {}", rule.scale);
    }
    text
}

fn range(values: impl Iterator<Item = usize> + Clone) -> String {
    match (values.clone().min(), values.max()) {
        (Some(least), Some(most)) if least != most => format!("{least}–{most}"),
        (Some(value), _) => value.to_string(),
        _ => "no".into(),
    }
}

/// One row per run of equal layers.
fn layer_table(layers: &[MoeSummary]) -> Table {
    use Align::{Left, Right};
    let shared = layers.iter().any(|l| l.shared_width.is_some());
    let ranks = layers.iter().any(|l| l.ranks.is_some());
    let mut columns =
        vec![("layers", Left), ("experts", Right), ("of", Right), ("top k", Right), ("width", Right)];
    let skips = layers.iter().any(|l| l.skip.is_some());
    columns.extend(skips.then_some(("skipped below", Right)));
    let limited = layers.iter().any(|l| l.capacity.is_some());
    columns.extend(limited.then_some(("capacity", Right)));
    columns.extend(shared.then_some(("shared", Right)));
    columns.push(("forms", Left));
    columns.extend(ranks.then_some(("ranks", Right)));
    columns.extend([("parameters", Right), ("bytes", Right)]);
    let pruned = layers.iter().any(|l| l.experts != l.original_experts);
    columns.retain(|(heading, _)| pruned || *heading != "of");
    let mut table = Table::new(columns);
    let mut rest = layers;
    while let Some(layer) = rest.first() {
        let (equal, others) = rest.split_at(equal_layers(rest));
        rest = others;
        let forms: Vec<String> = layer.forms.iter().map(|(form, n)| format!("{n} {form}")).collect();
        let mut cells = vec![layer_numbers(equal), layer.experts.to_string()];
        cells.extend(pruned.then(|| layer.original_experts.to_string()));
        let width = layer.widths.map_or_else(|| layer.width.to_string(), |w| range(w.into_iter()));
        cells.extend([layer.top_k.to_string(), width]);
        cells.extend(skips.then(|| layer.skip.as_ref().map_or_else(|| "–".into(), threshold)));
        cells.extend(limited.then(|| layer.capacity.map_or_else(|| "–".into(), |n| n.to_string())));
        cells.extend(shared.then(|| layer.shared_width.map_or_else(|| "–".into(), |w| w.to_string())));
        cells.push(forms.join(", ").replace('_', " "));
        cells.extend(ranks.then(|| layer.ranks.map_or_else(|| "–".into(), |r| range(r.into_iter()))));
        cells.push(parameters(equal.iter().map(|l| l.parameters).sum()));
        cells.push(bytes(equal.iter().map(|l| l.bytes).sum()));
        table.row(cells);
    }
    table
}

/// When experts are skipped: below this multiple of the first one's weight, or where all of them together are below
/// this share.
fn threshold(skip: &Skip) -> String {
    match skip.threshold {
        SkipThreshold::Ratio(ratio) => format!("{ratio:.3}"),
        SkipThreshold::Tail(tail) => format!("{:.1} %", 100.0 * tail),
    }
}

/// How many layers at the front of `layers` are equal and evenly spaced.
fn equal_layers(layers: &[MoeSummary]) -> usize {
    let equal = |a: &MoeSummary, b: &MoeSummary| MoeSummary { layer: b.layer, ..a.clone() } == *b;
    let [first, second, ..] = layers else { return layers.len() };
    let step = second.layer - first.layer;
    let follows = |pair: &&[MoeSummary]| equal(&pair[0], &pair[1]) && pair[1].layer - pair[0].layer == step;
    let count = 1 + layers.windows(2).take_while(follows).count();
    // Two layers with a gap between them are no pattern.
    if count == 2 && step > 1 { 1 } else { count }
}

fn layer_numbers(layers: &[MoeSummary]) -> String {
    match layers {
        [] => String::new(),
        [one] => one.layer.to_string(),
        [first, second, ..] => {
            let last = layers[layers.len() - 1].layer;
            match second.layer - first.layer {
                1 => format!("{}–{last}", first.layer),
                step => format!("{}–{last} by {step}", first.layer),
            }
        }
    }
}

fn size_table(model: &Inspection) -> Table {
    let (p, b) = (model.parameters, model.bytes);
    let headings = ["", "parameters", "share", "bytes", "share"];
    let aligned = headings.iter().map(|h| (*h, if h.is_empty() { Align::Left } else { Align::Right }));
    let mut table = Table::new(aligned);
    let mut row = |name: &str, count: u64, size: u64| {
        let (share, size_share) = (percent(count, p.total), percent(size, b.total));
        table.row([name.to_string(), parameters(count), share, bytes(size), size_share]);
    };
    row("routed experts", p.routed_experts, b.routed_experts);
    row("everything else", p.total - p.routed_experts, b.total - b.routed_experts);
    row("total", p.total, b.total);
    table.row(["active per token".to_string(), parameters(p.active), percent(p.active, p.total)]);
    table
}
