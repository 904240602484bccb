//! Finding router and experts of a layer: stock, or in the moepress layout.

use super::find::Finder;
use super::find_fused::Fused;
use super::source::{LinearSource, MoeSource, NormSource, PartNorms};
use super::{Error, Result};
use crate::architecture::{Choice, MoeSpec, NormPlacement, Projection};
use crate::backend::{Base, Expert, Linear, Matrix, Mlp, RouterWeights, StoredExpert};
use crate::checkpoint::{ExpertEntry, ExpertForm, LayerEntry, Tensor, Weight};

impl Finder<'_> {
    pub(super) fn moe(&self, moe: &MoeSpec) -> Result<MoeSource> {
        let (l, d) = (self.l, self.architecture.hidden_size);
        let names = &self.architecture.names;
        let entry = self.checkpoint.manifest().and_then(|m| m.layers.iter().find(|entry| entry.layer == l));
        let mut spec = moe.router.clone();
        let mut base = [None, None, None];
        let (experts, fused, numbers) = if let Some(entry) = entry {
            spec.top_k = entry.top_k;
            spec.skip = entry.skip;
            let numbers: Vec<usize> = entry.experts.iter().map(|e| e.expert).collect();
            let experts = self.listed_experts(entry, moe, &numbers)?;
            base = self.base(moe, &experts)?;
            (experts, Fused::default(), numbers)
        } else {
            let (experts, fused) = self.all_experts(moe)?;
            (experts, fused, (0..moe.experts).collect())
        };
        let shared = match moe.shared {
            None => None,
            Some(shared) => {
                let gate = || {
                    let gate = self.numbers(&names.shared_gate(l), &[1, d])?;
                    Weight::plain(gate).map_err(|e| self.error(e))
                };
                let gate = shared.gated.then(gate).transpose()?;
                Some((self.shared_mlp(shared.width)?, gate))
            }
        };
        let source = MoeSource {
            norms: self.part_norms()?,
            latent: moe.latent.map(|width| self.latent(width)).transpose()?,
            router: self.router(moe, experts.len())?,
            spec,
            capacity: moe.capacity,
            experts,
            base,
            width: moe.width,
            numbers,
            original_experts: moe.experts,
            shared,
            averaged: moe.shared.is_some_and(|shared| shared.averaged),
            fused: fused.tensors,
            fused_output_major: fused.output_major,
        };
        source.check_choices(l)?;
        Ok(source)
    }

    /// Norms of router, routed experts and shared expert, where these have their own.
    fn part_norms(&self) -> Result<Option<PartNorms<NormSource>>> {
        if self.architecture.norm_placement != NormPlacement::AroundParts {
            return Ok(None);
        }
        let [router, shared, shared_output, routed_output] = self.architecture.names.part_norms(self.l);
        let weight = self.numbers(&router, &[self.architecture.hidden_size])?;
        Ok(Some(PartNorms {
            router: NormSource { weight, bias: None },
            shared: self.norm(&shared)?,
            shared_output: self.norm(&shared_output)?,
            routed_output: self.norm(&routed_output)?,
        }))
    }

    /// The maps into and out of the latent of routed experts.
    fn latent(&self, width: usize) -> Result<[LinearSource; 2]> {
        let (d, bias) = (self.architecture.hidden_size, self.architecture.mlp_bias);
        let [into, back] = self.architecture.names.latent(self.l);
        Ok([self.linear(&into, width, d, bias)?, self.linear(&back, d, width, bias)?])
    }

    /// The shared expert, whichever way it is stored.
    fn shared_mlp(&self, width: usize) -> Result<Mlp<LinearSource>> {
        let (names, d) = (&self.architecture.names, self.architecture.hidden_size);
        let Some([gate_up, down]) = names.shared_gate_up(self.l) else {
            return self.mlp(width, |p| {
                let both = names.shared(self.l, p);
                self.either(&both, ".weight").to_string()
            });
        };
        let stored = self.weight(&gate_up, 2 * width, d)?;
        let rows = |first: usize| {
            let weight = stored.part(first, width).map_err(|e| self.error(e))?;
            Ok::<_, Error>(Linear { weight, bias: None })
        };
        Ok(Mlp {
            gate: rows(0)?,
            up: Some(rows(width)?),
            down: self.linear(&down, d, width, false)?,
            activation: self.architecture.dense_activation,
        })
    }

    fn router(&self, moe: &MoeSpec, experts: usize) -> Result<RouterWeights> {
        let (l, names) = (self.l, &self.architecture.names);
        if let Some([router, bias, _]) = names.with_images(l)
            && self.checkpoint.get(&router).is_some()
        {
            return self.router_with_images(&router, &bias, experts);
        }
        let routers = names.routers(l);
        let router = self.either(&routers, ".weight");
        let choice_bias = || {
            let stored = names.choice_biases(l);
            let name = self.either(&stored, "");
            if names.choice_bias_is_row {
                Ok(self.numbers(name, &[1, experts])?.entry(0))
            } else {
                self.numbers(name, &[experts])
            }
        };
        let scales = || self.numbers(&names.expert_scales(l), &[experts]);
        Ok(RouterWeights {
            weight: self.numbers(&format!("{router}.weight"), &[experts, self.architecture.hidden_size])?,
            bias: self.bias(router, experts, moe.router.bias)?,
            choice_bias: (moe.router.choice == Choice::BiasedScore).then(choice_bias).transpose()?,
            expert_scales: moe.router.expert_scales.then(scales).transpose()?,
        })
    }

    /// The router of text as published where experts of images are behind those of text.
    fn router_with_images(&self, router: &str, bias: &str, experts: usize) -> Result<RouterWeights> {
        let [_, name] = self.architecture.names.choice_biases(self.l);
        let weight = self.numbers(router, &[self.architecture.hidden_size, experts])?;
        Ok(RouterWeights {
            weight: weight.transposed(),
            bias: None,
            // The row of images stays in the checkpoint.
            choice_bias: Some(self.numbers(bias, &[2, experts])?.entry(0).renamed(name)),
            expert_scales: None,
        })
    }

    pub(super) fn weight_name(&self, e: usize, p: Projection) -> String {
        format!("{}.weight", self.architecture.names.expert(self.l, e, p))
    }

    /// The experts of a checkpoint in the moepress layout.
    fn listed_experts(
        &self,
        entry: &LayerEntry,
        moe: &MoeSpec,
        numbers: &[usize],
    ) -> Result<Vec<StoredExpert>> {
        let inconsistent = |what: String| Error::Inconsistent { layer: self.l, what };
        let width = |entry: &ExpertEntry| match entry.width {
            Some(width) if width > moe.width => {
                let (e, most) = (entry.expert, moe.width);
                Err(inconsistent(format!(
                    "expert {e} has width {width}, expected at most {most}, that of config.json"
                )))
            }
            width => Ok(width.unwrap_or(moe.width)),
        };
        let expert = |entry: &ExpertEntry| match &entry.form {
            ExpertForm::Dense => self.expert(entry.expert, moe, width(entry)?, [Kind::Dense; 3]),
            ExpertForm::LowRank { rank, rows } => {
                let [gate, up, down] = [0, 1, 2].map(|p| match (rank.all()[p], rows.all()[p]) {
                    (None, _) => Kind::Dense,
                    (Some(rank), None) => Kind::LowRank(rank),
                    (Some(rank), Some(rows)) => Kind::LowRankRows { rank, rows },
                });
                self.expert(entry.expert, moe, width(entry)?, [gate, up, down])
            }
            ExpertForm::Delta { rank } => {
                let kinds = rank.all().map(|rank| rank.map_or(Kind::Dense, Kind::Delta));
                self.expert(entry.expert, moe, moe.width, kinds)
            }
            ExpertForm::Alias { of } => match numbers.iter().position(|n| n == of) {
                Some(slot) => Ok(Expert::Alias(slot)),
                None => Err(inconsistent(format!("expert {} is an alias of nothing", entry.expert))),
            },
            ExpertForm::Constant => {
                let name = format!("{}constant", self.architecture.names.expert_prefix(self.l, entry.expert));
                Ok(Expert::Constant(self.numbers(&name, &[self.architecture.expert_io(moe)])?))
            }
        };
        entry.experts.iter().map(expert).collect()
    }

    /// The base of those experts that are differences from one.
    fn base(&self, moe: &MoeSpec, experts: &[StoredExpert]) -> Result<Base<Weight>> {
        let (d, width) = (self.architecture.expert_io(moe), moe.width);
        let mut base = [None, None, None];
        for p in Projection::ALL {
            let is_delta = |expert: &StoredExpert| match expert {
                Expert::Mlp(mlp) => mlp.map(p).is_some_and(|map| map.weight.is_delta()),
                _ => false,
            };
            if experts.iter().any(is_delta) {
                let (out, input) = if p == Projection::Down { (d, width) } else { (width, d) };
                base[p as usize] = Some(self.weight(&self.architecture.names.base(self.l, p), out, input)?);
            }
        }
        Ok(base)
    }

    /// The numbers of the dense rows of a matrix with `out` rows.
    fn row_numbers(&self, name: &str, count: usize, out: usize) -> Result<Vec<u32>> {
        let rows = self.tensor(name, &[count])?.to_i32().map_err(|e| self.error(e))?;
        let rows: Vec<u32> = rows.into_iter().map(|row| u32::try_from(row).unwrap_or(u32::MAX)).collect();
        let ascending = rows.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || rows.last().is_some_and(|row| *row as usize >= out) {
            let what = format!("{name}: expected row numbers from 0 to {}, ascending, each once", out - 1);
            return Err(Error::Inconsistent { layer: self.l, what });
        }
        Ok(rows)
    }

    /// Expert `e` of `width`, its tensors on their own.
    pub(super) fn expert(
        &self,
        e: usize,
        moe: &MoeSpec,
        width: usize,
        kinds: [Kind; 3],
    ) -> Result<StoredExpert> {
        let d = self.architecture.expert_io(moe);
        let map = |p: Projection| -> Result<_> {
            let stem = self.architecture.names.expert(self.l, e, p);
            let (out, input) = if p == Projection::Down { (d, width) } else { (width, d) };
            let factor = |name: &str, shape: [usize; 2]| {
                let tensor = self.numbers(&format!("{stem}.{name}"), &shape)?;
                Weight::plain(tensor).map_err(|e| self.error(e))
            };
            let u = |rank| factor("u", [out, rank]);
            let v = |rank| factor("v", [rank, input]);
            let weight = match kinds[p as usize] {
                Kind::Dense => Matrix::Dense(self.weight(&stem, out, input)?),
                Kind::LowRank(rank) => Matrix::LowRank { u: u(rank)?, v: v(rank)? },
                Kind::Delta(rank) => Matrix::Delta { u: u(rank)?, v: v(rank)? },
                Kind::LowRankRows { rank, rows } => Matrix::LowRankRows {
                    u: u(rank)?,
                    v: v(rank)?,
                    rows: self.row_numbers(&format!("{stem}.rows"), rows, out)?,
                    s: factor("s", [rows, input])?,
                },
            };
            Ok(Linear { weight, bias: self.bias(&stem, out, moe.expert_bias)? })
        };
        assemble(moe, map)
    }
}

/// How a matrix is stored.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Dense,
    LowRank(usize),
    LowRankRows { rank: usize, rows: usize },
    Delta(usize),
}

/// The expert whose linear maps are these.
pub(super) fn assemble(
    moe: &MoeSpec,
    map: impl Fn(Projection) -> Result<Linear<Matrix<Weight>, Tensor>>,
) -> Result<StoredExpert> {
    let up = || map(Projection::Up);
    Ok(Expert::Mlp(Mlp {
        gate: map(Projection::Gate)?,
        up: moe.activation.is_gated().then(up).transpose()?,
        down: map(Projection::Down)?,
        activation: moe.activation,
    }))
}
