//! Random layers of experts of every form, as the tests speak of them.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::emulator::Dtype;

/// Random numbers of a test.
pub(crate) struct Random(ChaCha8Rng);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform in 0..n.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n as u64) as usize
    }

    /// Uniform in ±1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// Roughly normal values of this standard deviation, rounded to the type.
    pub(crate) fn values(&mut self, dtype: Dtype, count: usize, deviation: f32) -> Vec<f32> {
        let mut normal = || (self.unit() + self.unit() + self.unit()) * deviation;
        (0..count).map(|_| dtype.round(normal())).collect()
    }

    /// Distinct numbers below n, ascending.
    pub(crate) fn subset(&mut self, n: usize, count: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        for i in 0..count {
            all.swap(i, i + self.below(n - i));
        }
        all.truncate(count);
        all.sort_unstable();
        all
    }
}

/// A weight [rows, cols], row-major.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) values: Vec<f32>,
}

impl Weight {
    pub(crate) fn random(random: &mut Random, dtype: Dtype, rows: usize, cols: usize) -> Self {
        let deviation = 1.0 / (cols.max(1) as f32).sqrt();
        Weight { rows, cols, values: random.values(dtype, rows * cols, deviation) }
    }

    pub(crate) fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.cols..(i + 1) * self.cols]
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Product {
    Dense(Weight),
    /// U [out, rank], V [rank, in].
    LowRank(Weight, Weight),
}

/// One linear map.
#[derive(Clone, Debug)]
pub(crate) struct Map {
    pub(crate) product: Product,
    /// Sparse rows: row numbers, and S [rows, in].
    pub(crate) rows: Option<(Vec<usize>, Weight)>,
    /// Whether the layer's base is added.
    pub(crate) base: bool,
    pub(crate) bias: Option<Vec<f32>>,
}

impl Map {
    pub(crate) fn random(random: &mut Random, dtype: Dtype, out: usize, input: usize, form: Form) -> Self {
        let mut low_rank = |rank| {
            Product::LowRank(
                Weight::random(random, dtype, out, rank),
                Weight::random(random, dtype, rank, input),
            )
        };
        let product = match form {
            Form::Dense => Product::Dense(Weight::random(random, dtype, out, input)),
            Form::LowRank(rank) | Form::Rows(rank, _) | Form::Delta(rank) => low_rank(rank),
        };
        let rows = match form {
            Form::Rows(_, count) => {
                Some((random.subset(out, count), Weight::random(random, dtype, count, input)))
            }
            _ => None,
        };
        Map { product, rows, base: matches!(form, Form::Delta(_)), bias: None }
    }
}

/// Form of a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Form {
    Dense,
    LowRank(usize),
    /// Low rank, and this many sparse rows.
    Rows(usize, usize),
    /// A base, and a delta of this rank.
    Delta(usize),
}

#[derive(Clone, Debug)]
pub(crate) enum Expert {
    /// Gate, up [width, hidden], down [hidden, width].
    Mlp {
        width: usize,
        maps: Box<[Map; 3]>,
    },
    Constant(Vec<f32>),
    Alias(usize),
    None,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Activation {
    SwiGlu,
    Clamped { limit: f32, slope: f32 },
    GeluTanh,
    Relu,
    SquaredRelu,
}

#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) dtype: Dtype,
    pub(crate) hidden: usize,
    pub(crate) experts: Vec<Expert>,
    /// Gate, up, down.
    pub(crate) base: Option<[Weight; 3]>,
    pub(crate) activation: Activation,
    /// Whether experts have two matrices: what up maps to is 1.
    pub(crate) without_up: bool,
}

impl Layer {
    pub(crate) fn new(dtype: Dtype, hidden: usize) -> Self {
        let (experts, activation) = (Vec::new(), Activation::SwiGlu);
        Layer { dtype, hidden, experts, base: None, activation, without_up: false }
    }

    /// Adds an expert of this width whose matrices have these forms.
    pub(crate) fn add(&mut self, random: &mut Random, width: usize, forms: [Form; 3]) {
        let [gate, up, down] = forms;
        let (dtype, hidden) = (self.dtype, self.hidden);
        let maps = [
            Map::random(random, dtype, width, hidden, gate),
            Map::random(random, dtype, width, hidden, up),
            Map::random(random, dtype, hidden, width, down),
        ];
        self.experts.push(Expert::Mlp { width, maps: Box::new(maps) });
    }

    pub(crate) fn add_base(&mut self, random: &mut Random, width: usize) {
        let mut weight = |rows, cols| Weight::random(random, self.dtype, rows, cols);
        self.base =
            Some([weight(width, self.hidden), weight(width, self.hidden), weight(self.hidden, width)]);
    }

    /// The slot whose weights this one runs.
    pub(crate) fn canonical(&self, e: usize) -> usize {
        if let Expert::Alias(of) = self.experts[e] { of } else { e }
    }

    /// Gives every map of every expert a bias.
    pub(crate) fn add_biases(&mut self, random: &mut Random) {
        for expert in &mut self.experts {
            let Expert::Mlp { maps, .. } = expert else { continue };
            for map in maps.iter_mut() {
                let out = match &map.product {
                    Product::Dense(w) | Product::LowRank(w, _) => w.rows,
                };
                map.bias = Some(random.values(Dtype::F32, out, 0.3));
            }
        }
    }
}

/// Chosen experts of a batch.
#[derive(Clone, Debug)]
pub(crate) struct Routes {
    pub(crate) slots: usize,
    /// [tokens, slots]; negative: skipped.
    pub(crate) ids: Vec<i32>,
    pub(crate) weights: Vec<f32>,
}

impl Routes {
    /// Distinct experts out of `live` for each token, with weights that sum to about one.
    pub(crate) fn random(random: &mut Random, tokens: usize, slots: usize, live: &[usize]) -> Self {
        let mut ids = Vec::new();
        for _ in 0..tokens {
            let mut order: Vec<usize> = live.to_vec();
            for i in 0..slots {
                let other = i + random.below(order.len() - i);
                order.swap(i, other);
                ids.push(order[i] as i32);
            }
        }
        let weights = (0..tokens * slots).map(|_| (random.unit() + 1.2) / slots as f32).collect();
        Routes { slots, ids, weights }
    }

    pub(crate) fn tokens(&self) -> usize {
        self.ids.len() / self.slots
    }
}
