//! The plan and its file.

use std::io;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::Formatter;

use super::check;
use super::costs::Costs;
use super::{Action, Error, Expected, Options, Result};
use crate::architecture::{Profile, Skip};
use crate::checkpoint::{Error as FileError, read_file, write_atomic};

/// Version of the plan file that this module reads and writes.
pub const VERSION: u64 = 1;

/// What becomes of every routed expert of a checkpoint. A person can read, edit and diff its file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Version of the format, field `moepress` of the file: [`VERSION`].
    #[serde(rename = "moepress")]
    pub version: u64,
    /// Name of the method that made it.
    pub method: String,
    /// The method's options, defaults included.
    pub options: Options,
    /// The checkpoint it is for.
    pub model: ModelRef,
    /// The statistics it was made from, `None` where it needed none.
    pub statistics: Option<StatisticsRef>,
    /// Every MoE layer, in order.
    pub layers: Vec<LayerPlan>,
    /// What the compressed checkpoint will be. Information only: after editing the layers by hand it may be
    /// out of date, and [`Plan::expect`] computes it again.
    pub expected: Expected,
    /// What the person who asked for the plan should know, one line each. Not in the file.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

/// The checkpoint that a plan is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModelRef {
    /// [`Profile::family`].
    pub family: String,
    /// [`Profile::identity`].
    pub identity: String,
}

/// The statistics that a plan was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StatisticsRef {
    /// The file, as it was named.
    pub file: String,
    /// SHA-256 of the token ids that were measured, in hexadecimal.
    pub sha256: String,
    /// Number of tokens measured.
    pub tokens: u64,
}

/// The plan of one MoE layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerPlan {
    /// 0-based decoder layer.
    pub layer: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// Which of those are left out at run time, where the plan has the layer skip experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip: Option<Skip>,
    /// Every original expert, in order.
    pub experts: Vec<ExpertPlan>,
    /// Loss of dropping the experts that the plan drops, where the method measured it. Information only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Experts that the super-expert guard protected; a later choice of other experts must keep them too.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub protected: Vec<usize>,
    /// What becomes of the router rows of merged experts.
    #[serde(skip_serializing_if = "MergedRows::is_redirect")]
    pub router: MergedRows,
}

/// What becomes of the router rows of merged experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MergedRows {
    /// They stay: what the router sends to a merged expert is sent to the one that took it in. A token that chooses both
    /// adds their weights and runs the expert once.
    #[default]
    Redirect,
    /// They go, and each token chooses among the experts that are left. That is another function than
    /// [`MergedRows::Redirect`], but needs no redirection, so a stock checkpoint can hold it.
    Fuse,
}

impl MergedRows {
    /// The word in the plan file.
    pub fn name(self) -> &'static str {
        match self {
            MergedRows::Redirect => "redirect",
            MergedRows::Fuse => "fuse",
        }
    }

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
    fn is_redirect(&self) -> bool {
        *self == MergedRows::Redirect
    }
}

impl LayerPlan {
    /// The plan of a layer whose experts, in order, have these actions; nothing is protected, and merged experts are
    /// redirected.
    pub fn new(layer: usize, top_k: usize, actions: impl IntoIterator<Item = Action>) -> Self {
        let expert = |(expert, action)| ExpertPlan { expert, action };
        let experts = actions.into_iter().enumerate().map(expert).collect();
        LayerPlan {
            layer,
            top_k,
            skip: None,
            experts,
            loss: None,
            protected: Vec::new(),
            router: MergedRows::default(),
        }
    }

    /// Whether the router keeps the row of an expert with `action`: it is neither dropped nor merged into another one
    /// under [`MergedRows::Fuse`].
    pub fn has_row(&self, action: &Action) -> bool {
        match action {
            Action::Drop => false,
            Action::Merge { .. } => self.router == MergedRows::Redirect,
            _ => true,
        }
    }

    /// Experts that the router can still choose.
    pub fn routed(&self) -> usize {
        self.experts.iter().filter(|e| self.has_row(&e.action)).count()
    }

    /// Experts whose router rows go, in the order of the list.
    pub fn without_row(&self) -> impl Iterator<Item = usize> {
        self.experts.iter().filter(|e| !self.has_row(&e.action)).map(|e| e.expert)
    }

    /// Experts that are dropped, in the order of the list.
    pub fn dropped(&self) -> impl Iterator<Item = usize> {
        self.experts.iter().filter(|e| e.action == Action::Drop).map(|e| e.expert)
    }
}

/// What becomes of one expert.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExpertPlan {
    /// Its number in the original checkpoint.
    pub expert: usize,
    /// What becomes of it.
    #[serde(flatten)]
    pub action: Action,
}

impl Plan {
    /// A plan for the checkpoint of `profile`, checked and with its `expected`.
    pub(super) fn assemble(
        profile: &Profile,
        method: &str,
        options: Options,
        statistics: Option<StatisticsRef>,
        layers: Vec<LayerPlan>,
        warnings: Vec<String>,
    ) -> Result<Plan> {
        let mut plan = Plan {
            version: VERSION,
            method: method.into(),
            options,
            model: ModelRef { family: profile.family.clone(), identity: profile.identity.clone() },
            statistics,
            layers,
            expected: Expected::default(),
            warnings,
        };
        plan.expected = plan.expect(profile)?;
        Ok(plan)
    }

    /// Reads a plan file and checks it as far as that is possible without the checkpoint. Layers and experts
    /// may stand in any order in the file; they are sorted here.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] around the first contradiction, which names layer, expert and field.
    pub fn read(path: impl AsRef<Path>) -> Result<Plan> {
        let path = path.as_ref();
        let failed = |source| Error::Io { path: path.into(), source };
        let text = String::from_utf8(read_file(path).map_err(failed)?).map_err(|e| {
            failed(io::Error::other(format!("not UTF-8 text (byte {})", e.utf8_error().valid_up_to())))
        })?;
        let plan = Plan::from_json(&text);
        plan.map_err(|problem| Error::File { path: path.into(), problem: Box::new(problem) })
    }

    /// [`Plan::read`] for a text in memory.
    ///
    /// # Errors
    /// [`Error::Json`]; [`Error::Plan`] for the first contradiction.
    pub fn from_json(text: &str) -> Result<Plan> {
        let value: Value = serde_json::from_str(text).map_err(Error::Json)?;
        let plan = super::read::plan(&value)?;
        check::structure(&plan)?;
        Ok(plan)
    }

    /// Checks the plan by itself and against the checkpoint of `profile`.
    ///
    /// # Errors
    /// [`Error::Plan`] for the first contradiction: version, family or identity, layers and experts that are
    /// missing, listed twice or out of range, fewer routed experts than `top_k` (for group-limited routers:
    /// in any choice of groups), ranks and channels that the matrices do not have, merge targets that are
    /// dropped or merged themselves. [`Error::Profile`] where the profile contradicts itself.
    pub fn check(&self, profile: &Profile) -> Result<()> {
        check::structure(self)?;
        check::against(self, profile)
    }

    /// Checks the plan and computes what the compressed checkpoint will be.
    ///
    /// # Errors
    /// Those of [`Plan::check`].
    pub fn expect(&self, profile: &Profile) -> Result<Expected> {
        self.check(profile)?;
        Ok(Expected::of(&Costs::of_options(profile, &self.options), &self.layers))
    }

    /// Bytes of the compressed checkpoint, safetensors headers included as far as they can be foreseen.
    ///
    /// # Errors
    /// Those of [`Plan::check`].
    pub fn bytes_on_disk(&self, profile: &Profile) -> Result<u64> {
        self.check(profile)?;
        Ok(Costs::of_options(profile, &self.options).on_disk_after(&self.layers))
    }

    /// Routed experts that remain in each MoE layer, neither dropped nor merged.
    pub fn experts_kept(&self) -> Vec<usize> {
        let kept = |l: &LayerPlan| l.experts.iter().filter(|e| e.action.is_stored()).count();
        self.layers.iter().map(kept).collect()
    }

    /// The text of the file: JSON with one expert per line.
    pub fn to_json(&self) -> String {
        let layers = self.layers.iter().map(layer_json).collect::<Vec<_>>();
        let fields = [
            ("moepress", line(&self.version)),
            ("method", line(&self.method)),
            ("options", line(&self.options)),
            ("model", line(&self.model)),
            ("statistics", line(&self.statistics)),
            ("layers", block(&layers, "  ")),
            ("expected", line(&self.expected)),
        ];
        let fields = fields.map(|(name, value)| format!("  {}: {value}", line(name)));
        format!("{{\n{}\n}}\n", fields.join(",\n"))
    }

    /// Writes the file; it appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]; `path` is then as it was before.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let written = write_atomic(path.as_ref(), self.to_json().as_bytes());
        written.map_err(|e| match e {
            FileError::Io { path, source } => Error::Io { path, source },
            other => Error::Io { path: path.as_ref().into(), source: io::Error::other(other) },
        })
    }
}

/// One layer: its experts one per line, all else on the lines around them.
fn layer_json(layer: &LayerPlan) -> String {
    let experts = layer.experts.iter().map(line).collect::<Vec<_>>();
    let (number, top_k, experts) = (layer.layer, layer.top_k, block(&experts, "    "));
    let protected = match layer.protected.as_slice() {
        [] => String::new(),
        protected => format!(", \"protected\": {}", line(&protected)),
    };
    let skip = layer.skip.map_or_else(String::new, |skip| format!(", \"skip\": {}", line(&skip)));
    let router = match layer.router {
        MergedRows::Redirect => String::new(),
        MergedRows::Fuse => format!(", \"router\": {}", line(&layer.router)),
    };
    let loss = layer.loss.map_or_else(String::new, |loss| format!(", \"loss\": {}", line(&loss)));
    format!(
        "{{\"layer\": {number}, \"top_k\": {top_k}{skip}{loss}, \"experts\": {experts}{protected}{router}}}"
    )
}

/// A JSON array with one item per line.
fn block(items: &[String], indent: &str) -> String {
    if items.is_empty() {
        return "[]".into();
    }
    format!("[\n{indent}  {}\n{indent}]", items.join(&format!(",\n{indent}  ")))
}

/// JSON on one line, with a space after every comma and colon.
fn line<T: Serialize + ?Sized>(value: &T) -> String {
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, Spaced);
    match value.serialize(&mut serializer) {
        Ok(()) => String::from_utf8_lossy(&out).into_owned(),
        // Writing to memory cannot fail, and every key of a plan is a string.
        Err(error) => unreachable!("plain data serialises: {error}"),
    }
}

/// The compact format with spaces.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}
