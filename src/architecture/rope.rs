//! Rotary position embeddings (Su et al., arXiv 2104.09864) and their long-context variants, reduced to one vector
//! of inverse frequencies and one magnitude.

use std::f64::consts::PI;

use super::config::Config;
use super::{Error, Result};

/// Upper bound of the elements that are rotated: every layer holds their frequencies.
const MOST_ELEMENTS: usize = 1 << 13;

/// Where the embedding bounds no window; this only bounds what is asked for.
pub(super) const MOST_POSITIONS: usize = 1 << 20;

/// Which elements of a head form a rotated pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// (x_i, x_{i + d/2}).
    Halves,
    /// (x_{2i}, x_{2i+1}).
    Adjacent,
}

/// A rotary embedding of `2 · inverse_frequencies.len()` elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Which elements form a pair.
    pub pairing: Pairing,
    /// Angle of pair i at position p: p · `inverse_frequencies[i]`, in radians.
    pub inverse_frequencies: Vec<f32>,
    /// Factor of cosine and sine.
    pub magnitude: f32,
    /// What takes the place of these in long windows, if anything does.
    pub long: Option<LongRope>,
    /// How the frequencies of long windows follow from their length, if they do.
    pub dynamic: Option<DynamicRope>,
}

/// Dynamic NTK scaling (bloc97 and emozilla, 2023): in a text of L tokens, more than the model was trained with, the
/// base θ becomes θ (factor · L / positions − (factor − 1))^(d / (d − 2)). Keys in a cache stay as they were rotated when
/// the text was shorter, as in transformers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DynamicRope {
    /// Length of the longest windows that keep the usual embedding.
    pub positions: usize,
    /// By how much the context is stretched.
    pub factor: f64,
    /// θ.
    pub theta: f64,
}

impl DynamicRope {
    /// The frequencies of `dim` elements in a text of `length` tokens, which are more than `positions`.
    pub fn inverse_frequencies(&self, dim: usize, length: usize) -> Vec<f32> {
        let stretch = self.factor * length as f64 / self.positions as f64 - (self.factor - 1.0);
        let theta = self.theta * stretch.powf(dim as f64 / (dim as f64 - 2.0));
        frequencies(theta, dim).into_iter().map(|f| f as f32).collect()
    }
}

/// θ^(−2i/dim).
fn frequencies(theta: f64, dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim as f64)).collect()
}

/// The embedding of windows longer than some length.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// Length of the longest windows that keep the usual embedding.
    pub positions: usize,
    /// Replaces [`Rope::inverse_frequencies`]; as many.
    pub inverse_frequencies: Vec<f32>,
    /// Replaces [`Rope::magnitude`].
    pub magnitude: f32,
}

impl Rope {
    /// Whether texts of `a` and of `b` tokens are rotated by the same frequencies.
    pub(crate) fn is_same_for(&self, a: usize, b: usize) -> bool {
        let long = self.long.as_ref().is_none_or(|l| (a > l.positions) == (b > l.positions));
        long && self.dynamic.is_none_or(|d| a == b || a.max(b) <= d.positions)
    }

    /// Number of rotated elements.
    pub fn dim(&self) -> usize {
        2 * self.inverse_frequencies.len()
    }
}

/// The keys of a rotary embedding, wherever the config has them.
#[derive(Clone)]
pub(super) struct RopeConfig {
    section: Option<Config>,
    kind: String,
    theta: f64,
    max_positions: usize,
    original_positions: Option<usize>,
    partial: f64,
}

/// What absent keys mean.
#[derive(Clone, Copy)]
pub(super) struct RopeDefaults {
    pub(super) theta: f64,
    /// Share of a head that is rotated.
    pub(super) partial: f64,
    /// Text of the whole section.
    pub(super) section: Option<&'static str>,
}

impl RopeConfig {
    /// Reads `rope_scaling` and `rope_theta`, or `written`, which is `rope_parameters` (as transformers 5 writes it) or a
    /// part of that; where a config has both, transformers takes the former.
    pub(super) fn read(
        config: &Config,
        written: Option<Config>,
        defaults: RopeDefaults,
        max_positions: usize,
    ) -> Result<Self> {
        let scaling = config.section("rope_scaling")?.filter(|section| !section.is_empty());
        let section = match (scaling, written) {
            (None, None) => defaults.section.map(Config::parse).transpose()?,
            (section, written) => section.or(written),
        };
        if let Some(key) = section.as_ref().and_then(Config::nested) {
            let what = "is an object: embeddings that differ between layers are not supported";
            return Err(Error::invalid(&format!("rope_parameters.{key}"), what));
        }
        let nested = match &section {
            Some(s) => s.float_opt("rope_theta")?,
            None => None,
        };
        let theta = match nested {
            Some(theta) => theta,
            None => config.float_or("rope_theta", defaults.theta)?,
        };
        check_theta("rope_theta", theta)?;
        let kind = match &section {
            Some(s) => match s.first(&["rope_type", "type"]) {
                Some(key) => s.string(key)?,
                None => "default".into(),
            },
            None => "default".into(),
        };
        let nested = match &section {
            Some(s) => s.float_opt("partial_rotary_factor")?,
            None => None,
        };
        let partial = match nested {
            Some(partial) => partial,
            None => config.float_or("partial_rotary_factor", defaults.partial)?,
        };
        if !(0.0..=1.0).contains(&partial) {
            let what = format!("is {partial}, expected a number from 0 to 1");
            return Err(Error::invalid("partial_rotary_factor", what));
        }
        let original_positions = config.size_opt("original_max_position_embeddings")?;
        Ok(RopeConfig { section, kind, theta, max_positions, original_positions, partial })
    }

    /// The embedding of the rotated part of a head; of the proportional kind, of the whole head.
    pub(super) fn of_head(&self, head_dim: usize, pairing: Pairing) -> Result<Rope> {
        match &self.section {
            Some(section) if self.kind == "proportional" => self.proportional(section, head_dim, pairing),
            _ => self.rope((head_dim as f64 * self.partial) as usize, pairing),
        }
    }

    /// mscale of DeepSeek's attention scale, 1 where the config asks for none (arXiv 2405.04434, §3.1.4).
    pub(super) fn attention_mscale(&self) -> Result<f64> {
        let Some(section) = &self.section else { return Ok(1.0) };
        match (section.float_or("mscale_all_dim", 0.0)?, section.float_opt("factor")?) {
            (all, Some(factor)) if all != 0.0 && self.kind != "default" => Ok(yarn_mscale(factor, all)),
            _ => Ok(1.0),
        }
    }

    /// The embedding of `dim` elements.
    pub(super) fn rope(&self, dim: usize, pairing: Pairing) -> Result<Rope> {
        check_dim(dim)?;
        let base = frequencies(self.theta, dim);
        let (inverse, magnitude) = match (self.kind.as_str(), &self.section) {
            ("default", _) | (_, None) => (base, 1.0),
            ("dynamic", Some(s)) => return self.dynamic(s, &base, pairing),
            ("linear", Some(s)) => {
                let factor = positive(s, "factor")?;
                (base.iter().map(|f| f / factor).collect(), 1.0)
            }
            ("yarn", Some(s)) => self.yarn(s, &base, dim)?,
            ("llama3", Some(s)) => (self.llama3(s, &base)?, 1.0),
            ("longrope", Some(s)) => return self.longrope(s, &base, pairing),
            (other, Some(_)) => {
                let what = format!(
                    "is `{other}`; known: default, dynamic, linear, yarn, llama3, longrope, proportional"
                );
                return Err(Error::invalid("rope_scaling.rope_type", what));
            }
        };
        let inverse_frequencies = inverse.into_iter().map(|f| f as f32).collect();
        Ok(Rope { pairing, inverse_frequencies, magnitude: magnitude as f32, long: None, dynamic: None })
    }

    /// The same with another base, which `key` says.
    pub(super) fn with_theta(&self, key: &str, theta: f64) -> Result<Self> {
        check_theta(key, theta)?;
        Ok(RopeConfig { theta, ..self.clone() })
    }

    /// Longest window that the embedding is made for; there is no bound where it follows the length.
    pub(super) fn max_positions(&self) -> usize {
        if self.kind == "dynamic" { MOST_POSITIONS.max(self.max_positions) } else { self.max_positions }
    }

    /// The embedding of Hunyuan, whose `alpha` stretches the base once for all, whatever the length of a text:
    /// θ alpha^(d / (d − 2)) for heads of width d.
    pub(super) fn with_alpha(mut self, head_dim: usize) -> Result<Self> {
        let alpha = match &self.section {
            Some(section) if self.kind == "dynamic" => section.float_opt("alpha")?,
            _ => None,
        };
        if let Some(alpha) = alpha.filter(|alpha| *alpha != 0.0) {
            if alpha < 1.0 || head_dim < 4 {
                let what = format!("is {alpha}, expected at least 1, and heads of width 4 or more");
                return Err(Error::invalid("rope_scaling.alpha", what));
            }
            self.theta *= alpha.powf(head_dim as f64 / (head_dim as f64 - 2.0));
            self.kind = "default".into();
        }
        Ok(self)
    }

    /// The same, where YaRN may be called `name` as well.
    pub(super) fn with_name_of_yarn(mut self, name: &str) -> Self {
        if self.kind == name {
            self.kind = "yarn".into();
        }
        self
    }

    /// Another number of the section.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.section.as_ref().map_or(Ok(None), |section| section.float_opt(key))
    }

    /// What kind of embedding it is, as `rope_type` has it.
    pub(super) fn kind(&self) -> &str {
        &self.kind
    }

    /// The first pairs of a head, a share of all, have the frequencies that they have where all are rotated; the others
    /// stand still (Gemma 4).
    fn proportional(&self, section: &Config, head_dim: usize, pairing: Pairing) -> Result<Rope> {
        check_dim(head_dim)?;
        let factor = section.above_zero("factor")?.unwrap_or(1.0);
        let rotated = (self.partial * head_dim as f64 / 2.0) as usize;
        let all = frequencies(self.theta, head_dim).into_iter().enumerate();
        let inverse = all.map(|(i, f)| if i < rotated { (f / factor) as f32 } else { 0.0 });
        let inverse_frequencies = inverse.collect();
        Ok(Rope { pairing, inverse_frequencies, magnitude: 1.0, long: None, dynamic: None })
    }

    fn dynamic(&self, section: &Config, base: &[f64], pairing: Pairing) -> Result<Rope> {
        let factor = positive(section, "factor")?;
        if base.len() < 2 {
            let what = "leaves 2 rotated elements, but dynamic scaling needs 4 or more";
            return Err(Error::invalid("head_dim", what));
        }
        Ok(Rope {
            pairing,
            inverse_frequencies: base.iter().map(|f| *f as f32).collect(),
            magnitude: 1.0,
            long: None,
            dynamic: Some(DynamicRope { positions: self.max_positions, factor, theta: self.theta }),
        })
    }

    /// Positions of the first training; a key outside the section wins, as in transformers.
    fn original(&self, section: &Config) -> Result<f64> {
        let own = section.size_opt("original_max_position_embeddings")?;
        Ok(self.original_positions.or(own).unwrap_or(self.max_positions) as f64)
    }

    /// LongRoPE (Ding et al., arXiv 2402.13753): a divisor per frequency, others for windows longer than the first
    /// training's. Phi-3.5-MoE gives a magnitude for each length, and transformers never takes its long divisors.
    fn longrope(&self, section: &Config, base: &[f64], pairing: Pairing) -> Result<Rope> {
        let original = self.original(section)?;
        if original <= 1.0 {
            let what = format!("is {original}, expected more than 1");
            return Err(Error::invalid("original_max_position_embeddings", what));
        }
        let divided = |key: &str| -> Result<Vec<f32>> {
            let name = format!("rope_scaling.{key}");
            let factors = section.floats(key)?.ok_or_else(|| Error::invalid(&name, "is missing"))?;
            if factors.len() != base.len() || factors.iter().any(|f| *f <= 0.0) {
                let what = format!("has {} numbers, expected {} above 0", factors.len(), base.len());
                return Err(Error::invalid(&name, what));
            }
            Ok(base.iter().zip(factors).map(|(b, f)| (b / f) as f32).collect())
        };
        let short = divided("short_factor")?;
        let mscales = [section.float_opt("short_mscale")?, section.float_opt("long_mscale")?];
        let (long, magnitudes) = if let [Some(short_mscale), Some(long_mscale)] = mscales {
            (short.clone(), [short_mscale, long_mscale])
        } else {
            let ratio = section.float_opt("factor")?.unwrap_or(self.max_positions as f64 / original);
            let magnitude = match section.float_opt("attention_factor")? {
                Some(given) => given,
                None if ratio <= 1.0 => 1.0,
                None => (1.0 + ratio.ln() / original.ln()).sqrt(),
            };
            (divided("long_factor")?, [magnitude; 2])
        };
        let [magnitude, long_magnitude] = magnitudes.map(|m| m as f32);
        let positions = original as usize;
        let long = LongRope { positions, inverse_frequencies: long, magnitude: long_magnitude };
        Ok(Rope { pairing, inverse_frequencies: short, magnitude, long: Some(long), dynamic: None })
    }

    /// YaRN (Peng et al., arXiv 2309.00071, eq. 23 and §3.4).
    fn yarn(&self, section: &Config, base: &[f64], dim: usize) -> Result<(Vec<f64>, f64)> {
        let original = self.original(section)?;
        let factor = match section.float_opt("factor")? {
            // Written as `null`: as much as the positions grew.
            None if section.mentions("factor") => self.max_positions as f64 / original,
            _ => positive(section, "factor")?,
        };
        let correction =
            |rotations: f64| dim as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        // 0 means the default, as in transformers.
        let beta = |key, usual| -> Result<f64> {
            Ok(section.float_opt(key)?.filter(|b| *b != 0.0).unwrap_or(usual))
        };
        let mut low = correction(beta("beta_fast", 32.0)?);
        let mut high = correction(beta("beta_slow", 1.0)?);
        if section.flag_or("truncate", true)? {
            low = low.floor();
            high = high.ceil();
        }
        low = low.max(0.0);
        high = high.min(dim as f64 - 1.0);
        if high - low == 0.0 {
            high += 0.001;
        }
        let blend = |(i, f): (usize, &f64)| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            f / factor * ramp + f * (1.0 - ramp)
        };
        let (mscale, all) = (section.float_or("mscale", 0.0)?, section.float_or("mscale_all_dim", 0.0)?);
        let magnitude = match section.float_opt("attention_factor")? {
            Some(given) => given,
            None if mscale != 0.0 && all != 0.0 => yarn_mscale(factor, mscale) / yarn_mscale(factor, all),
            None => yarn_mscale(factor, 1.0),
        };
        Ok((base.iter().enumerate().map(blend).collect(), magnitude))
    }

    /// The frequency bands of Llama 3.1: long wavelengths are stretched, short ones kept.
    fn llama3(&self, section: &Config, base: &[f64]) -> Result<Vec<f64>> {
        let factor = positive(section, "factor")?;
        let low = positive(section, "low_freq_factor")?;
        let high = positive(section, "high_freq_factor")?;
        let original = self.original(section)?;
        let scaled = base.iter().map(|&f| {
            let wavelength = 2.0 * PI / f;
            if wavelength < original / high {
                f
            } else if wavelength > original / low {
                f / factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                f * ((1.0 - smooth) / factor + smooth)
            }
        });
        Ok(scaled.collect())
    }
}

/// Errors where the base gives no falling frequencies.
fn check_theta(key: &str, theta: f64) -> Result<()> {
    if theta <= 1.0 {
        return Err(Error::invalid(key, format!("is {theta}, expected more than 1")));
    }
    Ok(())
}

/// Errors where `dim` elements cannot be rotated.
fn check_dim(dim: usize) -> Result<()> {
    if dim == 0 || !dim.is_multiple_of(2) {
        let what = format!("gives {dim} rotated elements, expected an even number");
        return Err(Error::invalid("head_dim", what));
    }
    if dim > MOST_ELEMENTS {
        let what = format!("gives {dim} rotated elements, expected at most {MOST_ELEMENTS}");
        return Err(Error::invalid("head_dim", what));
    }
    Ok(())
}

fn positive(section: &Config, key: &str) -> Result<f64> {
    match section.float_opt(key)? {
        Some(value) if value > 0.0 => Ok(value),
        Some(value) => {
            Err(Error::invalid(&format!("rope_scaling.{key}"), format!("is {value}, expected more than 0")))
        }
        None => Err(Error::invalid(&format!("rope_scaling.{key}"), "is missing")),
    }
}

fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(text: &str, theta: f64, dim: usize) -> (Rope, f64) {
        let config = Config::parse(text).unwrap();
        let defaults = RopeDefaults { theta, partial: 1.0, section: None };
        let written = config.section("rope_parameters").unwrap();
        let read = RopeConfig::read(&config, written, defaults, 163_840).unwrap();
        (read.rope(dim, Pairing::Adjacent).unwrap(), read.attention_mscale().unwrap())
    }

    /// Values held by transformers for DeepSeek-V2-Lite.
    #[test]
    fn yarn_of_deepseek_v2_lite() {
        let text = r#"{"rope_theta": 10000, "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
            "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.707}}"#;
        let (rope, mscale) = rope(text, 1e4, 64);
        let expected = [
            (0, 1.0),
            (9, 7.498941571e-2),
            (10, 5.623412877e-2),
            (11, 3.900692612e-2),
            (16, 5.500000436e-3),
            (22, 1.778279402e-4),
            (23, 3.333803397e-5),
            (24, 2.499999937e-5),
            (31, 3.333803534e-6),
        ];
        for (i, value) in expected {
            let relative: f64 = f64::from(rope.inverse_frequencies[i]) / value - 1.0;
            assert!(relative.abs() < 3e-7, "pair {i}: {relative}");
        }
        assert!((rope.magnitude - 1.0).abs() < f32::EPSILON);
        let scale = 192f64.powf(-0.5) * mscale * mscale;
        assert!((scale - 0.114_721).abs() < 5e-7, "{scale}");
    }

    /// Values held by transformers for gpt-oss, whose YaRN does not truncate its bounds.
    #[test]
    fn yarn_without_truncation() {
        let text = r#"{"rope_theta": 150000, "rope_scaling": {"rope_type": "yarn", "factor": 32, "beta_fast": 32,
            "beta_slow": 1, "original_max_position_embeddings": 4096, "truncate": false}}"#;
        let (rope, _) = rope(text, 1e4, 64);
        for (i, value) in
            [(9, 3.170569614e-2), (11, 1.159204915e-2), (16, 4.564839182e-4), (22, 8.635495760e-6)]
        {
            let relative: f64 = f64::from(rope.inverse_frequencies[i]) / value - 1.0;
            assert!(relative.abs() < 3e-7, "pair {i}: {relative}");
        }
        assert!((f64::from(rope.magnitude) - 1.346_573_590_279_972_7).abs() < 1e-7);
    }

    #[test]
    fn theta_of_the_chosen_section_wins_over_the_top_level() {
        let text =
            r#"{"rope_theta": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}"#;
        let (rope, _) = rope(text, 1e4, 4);
        assert!((rope.inverse_frequencies[1] - 1e-3).abs() < 1e-9);
    }

    /// As transformers gives them for 40 tokens after 16: `(factor * seq_len / max) - (factor - 1)` is 7.
    #[test]
    fn dynamic_base_of_a_long_text() {
        let text = r#"{"rope_theta": 10000, "rope_scaling": {"type": "dynamic", "factor": 4.0}}"#;
        let config = Config::parse(text).unwrap();
        let read =
            RopeConfig::read(&config, None, RopeDefaults { theta: 1.0, partial: 1.0, section: None }, 16)
                .unwrap();
        let rope = read.rope(8, Pairing::Halves).unwrap();
        assert_eq!(rope.inverse_frequencies, [1.0, 0.1, 0.01, 0.001]);
        let theta = 1e4 * 7f64.powf(8.0 / 6.0);
        for (i, found) in rope.dynamic.unwrap().inverse_frequencies(8, 40).iter().enumerate() {
            assert!((f64::from(*found) / theta.powf(-(i as f64) / 4.0) - 1.0).abs() < 1e-6);
        }
        assert_eq!(read.max_positions(), MOST_POSITIONS);
    }

    /// A quarter of the pairs, and the frequencies are those of the whole head.
    #[test]
    fn proportional_pairs_of_a_head() {
        let text = r#"{"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25,
            "rope_theta": 10000.0}}"#;
        let config = Config::parse(text).unwrap();
        let defaults = RopeDefaults { theta: 1.0, partial: 1.0, section: None };
        let written = config.section("rope_parameters").unwrap();
        let read = RopeConfig::read(&config, written, defaults, 64).unwrap();
        let rope = read.of_head(16, Pairing::Halves).unwrap();
        assert_eq!(rope.inverse_frequencies[2..], [0.0; 6]);
        let expected = [1.0, 10f32.powf(-0.5)];
        let found = rope.inverse_frequencies.iter().zip(expected);
        assert!(found.map(|(f, e)| (f - e).abs()).all(|d| d < 1e-7), "{rope:?}");
    }

    /// Short divisors up to the first training's length, long ones beyond; Phi's magnitudes.
    #[test]
    fn longrope_by_length() {
        let factors = r#""short_factor": [1, 2], "long_factor": [4, 8]"#;
        let text = format!(
            r#"{{"rope_theta": 10000, "rope_scaling": {{"type": "longrope", {factors}, "original_max_position_embeddings": 1024}}}}"#
        );
        let (usual, _) = rope(&text, 1e4, 4);
        let long = usual.long.unwrap();
        assert_eq!(
            (usual.inverse_frequencies, long.inverse_frequencies),
            (vec![1.0, 0.005], vec![0.25, 0.00125])
        );
        // √(1 + ln 160 / ln 1024)
        let magnitude = (1.0 + 160f64.ln() / 1024f64.ln()).sqrt() as f32;
        assert_eq!((usual.magnitude, long.magnitude, long.positions), (magnitude, magnitude, 1024));

        let text = text.replace("\"type\"", "\"short_mscale\": 1.5, \"long_mscale\": 2.0, \"type\"");
        let (phi, _) = rope(&text, 1e4, 4);
        let long = phi.long.unwrap();
        assert_eq!(phi.inverse_frequencies, long.inverse_frequencies);
        assert_eq!((phi.magnitude, long.magnitude), (1.5, 2.0));
    }
}
