//! `moepress methods`: every method, what it needs, its options and its paper.

use moepress::plan::{Method, OptionSpec, methods};
use serde_json::{Value, json};

use super::common::OutputArgs;
use super::failure::Failure;
use super::output;

/// Arguments of `methods`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Show this method only
    name: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let chosen: Vec<&dyn Method> = match &self.name {
            Some(name) => vec![moepress::plan::method(name)?],
            None => methods().to_vec(),
        };
        if self.output.json {
            return output::json(&chosen.iter().map(|m| as_json(*m)).collect::<Vec<_>>());
        }
        let pages: Vec<String> = groups(&chosen).iter().map(|group| page(group)).collect();
        output::text(&pages.join("\n"))
    }
}

fn as_json(method: &dyn Method) -> Value {
    let option = |o: &OptionSpec| json!({ "name": o.name, "values": o.kind.to_string(), "default": o.default, "help": o.help });
    let needs = method.needs();
    json!({
        "name": method.name(),
        "description": method.description(),
        "needs": {
            "statistics": needs.statistics,
            "second_moments": needs.second_moments,
            "tokens": needs.tokens,
            "checkpoint": needs.checkpoint,
        },
        "options": method.options().iter().map(option).collect::<Vec<_>>(),
        "paper": method.paper().map(|p| json!({ "title": p.title, "arxiv": p.arxiv })),
    })
}

/// Consecutive methods with the same options, which are then shown once.
fn groups<'a>(methods: &[&'a dyn Method]) -> Vec<Vec<&'a dyn Method>> {
    let mut groups: Vec<Vec<&dyn Method>> = Vec::new();
    for &method in methods {
        let names = |m: &dyn Method| m.options().iter().map(|o| o.name).collect::<Vec<_>>();
        match groups.last_mut() {
            Some(group) if names(group[0]) == names(method) => group.push(method),
            _ => groups.push(vec![method]),
        }
    }
    groups
}

fn page(group: &[&dyn Method]) -> String {
    let width = group.iter().map(|m| m.name().len()).max().unwrap_or(0);
    let mut text = String::new();
    for method in group {
        text += &format!("{:<width$}  {}\n", method.name(), method.description());
        let needs = method.needs();
        let wanted = [
            (needs.statistics, "statistics"),
            (needs.second_moments, "second moments, or tokens when compressing"),
            (needs.tokens, "the model and tokens"),
            (needs.checkpoint, "the model and another checkpoint"),
        ];
        let wanted: Vec<&str> = wanted.iter().filter(|(needed, _)| *needed).map(|(_, what)| *what).collect();
        let needs = if wanted.is_empty() {
            "needs no data".into()
        } else {
            format!("needs {}", wanted.join(" and "))
        };
        let paper = method.paper().map(|p| format!("; {}, arXiv {}", p.title, p.arxiv)).unwrap_or_default();
        text += &format!("{:<width$}  {needs}{paper}\n", "");
    }
    let options = group[0].options();
    let option_width = options.iter().map(|o| o.name.len()).max().unwrap_or(0);
    text += "\n  options (--set KEY=VALUE):\n";
    for OptionSpec { name, kind, default, help } in options {
        let default = default.map(|d| format!(" [default: {d}]")).unwrap_or_default();
        text += &format!("  {name:<option_width$}  {kind}: {help}{default}\n");
    }
    text
}
