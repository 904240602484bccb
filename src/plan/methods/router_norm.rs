//! Experts whose router row changed least when the model was fine-tuned.

use std::path::Path;

use super::prune;
use super::selection::Selection;
use super::{Method, Needs, Paper, Request};
use crate::architecture::MoeProfile;
use crate::plan::check;
use crate::plan::error::Place;
use crate::plan::options::{self, OptionKind};
use crate::plan::score::Rule;
use crate::plan::{Action, Error, OptionSpec, Plan, Result};

/// Norms of router rows, from whoever owns the weights.
pub trait RouterSource {
    /// ‖w‖ of every row of the router of the 0-based decoder layer; of the checkpoint in the folder `other` where one is
    /// named, which must be of the same shape.
    ///
    /// # Errors
    /// A message that says what failed.
    fn row_norms(&self, layer: usize, other: Option<&Path>) -> Result<Vec<f64>, String>;
}

/// The method.
pub(super) struct RouterNorm;

const NAME: &str = "router-norm";

static OPTIONS: [OptionSpec; 3] = {
    let [scope, floor, ..] = prune::OPTIONS_OF_SCORES;
    let pretrained = OptionSpec {
        name: "pretrained",
        kind: OptionKind::Folder,
        default: None,
        help: "the checkpoint that the model was fine-tuned from",
    };
    [pretrained, scope, floor]
};

impl Method for RouterNorm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn paper(&self) -> Option<Paper> {
        Some(Paper {
            title: "A Provably Effective Method for Pruning Experts in Fine-tuned Sparse Mixture-of-Experts",
            arxiv: "2405.16646",
        })
    }

    fn description(&self) -> &'static str {
        "drops the experts whose router row grew least by fine-tuning: ‖w‖ − ‖w pretrained‖; needs two checkpoints, no text"
    }

    fn needs(&self) -> Needs {
        Needs { checkpoint: true, ..Needs::default() }
    }

    fn options(&self) -> &'static [OptionSpec] {
        &OPTIONS
    }

    fn plan(&self, request: &Request<'_>) -> Result<Plan> {
        let profile = request.profile;
        check::profile(profile)?;
        let options = options::resolve(NAME, &OPTIONS, request.options)?;
        let Some(pretrained) = options::text(&options, "pretrained").map(Path::new) else {
            let expected =
                "give the checkpoint that the model was fine-tuned from: --set pretrained=DIR".into();
            return Err(Error::Option { option: "pretrained".into(), value: String::new(), expected });
        };
        let Some(source) = request.routers else {
            let problem = "router-norm looks at the weights; give the fine-tuned checkpoint with --model";
            return Err(Error::Missing(problem.into()));
        };
        let Some(budget) = request.budget else {
            return Err(Error::Missing(format!("{NAME}: no budget; give --remove, --experts or --bytes")));
        };
        let scores = |layer: &MoeProfile| -> Result<Vec<f64>> {
            let place = || Place::layer(layer.layer);
            let norms =
                |other| source.row_norms(layer.layer, other).map_err(|problem| place().spectrum(problem));
            let (tuned, before) = (norms(None)?, norms(Some(pretrained))?);
            if tuned.len() != layer.experts || before.len() != layer.experts {
                let (found, expected) = (before.len(), layer.experts);
                let dir = pretrained.display();
                let problem =
                    format!("{dir} has {found} router rows, expected {expected}; give the same model");
                return Err(place().spectrum(problem));
            }
            Ok(tuned.iter().zip(&before).map(|(after, before)| after - before).collect())
        };
        let scores = profile.moe_layers.iter().map(scores).collect::<Result<Vec<_>>>()?;
        // The rule is not used: the scores are there already.
        let selection = Selection { method: NAME, rule: Rule::Random, action: Action::Drop };
        selection.plan_scored(request, budget, &options, None, &scores)
    }
}
