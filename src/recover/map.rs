//! One weight matrix in training: the parts that it is the sum of, forwards and backwards.

use std::sync::Arc;

use crate::backend::cpu::{multiply, transpose};
use crate::checkpoint::{Dtype, Tensor, encode_f32};

/// Values that are trained, `[rows, cols]` row-major, and what Adam remembers of their gradients.
#[derive(Clone, Debug)]
pub(super) struct Parameter {
    pub(super) values: Vec<f32>,
    pub(super) cols: usize,
    /// The type in which they will be stored.
    pub(super) dtype: Dtype,
    pub(super) gradient: Vec<f32>,
    pub(super) mean: Vec<f32>,
    pub(super) variance: Vec<f32>,
    /// Size of a step relative to the learning rate.
    pub(super) scale: f32,
}

impl Parameter {
    /// Steps are in units of the root mean square of `values`, so that one learning rate serves factors of any size;
    /// `scale` takes its place where all are 0.
    pub(super) fn new(values: Vec<f32>, cols: usize, dtype: Dtype, scale: f32) -> Self {
        let square: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
        let rms = (square / values.len().max(1) as f64).sqrt() as f32;
        Parameter {
            values,
            cols,
            dtype,
            gradient: Vec::new(),
            mean: Vec::new(),
            variance: Vec::new(),
            scale: if rms > 0.0 { rms } else { scale },
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.values.len() / self.cols.max(1)
    }

    /// The values as they will be stored.
    pub(super) fn stored(&self) -> Vec<f32> {
        if self.dtype == Dtype::F32 {
            return self.values.clone();
        }
        let bytes = encode_f32(self.dtype, &self.values);
        let tensor = Tensor::owned("", self.dtype, vec![self.values.len()], bytes);
        tensor.to_f32().unwrap_or_else(|_| unreachable!("a type that values are stored in"))
    }
}

/// One summand of a weight matrix `[out, in]`.
#[derive(Clone, Debug)]
pub(super) enum Part {
    /// A full matrix.
    Dense(Parameter),
    /// U·V.
    Product { u: Parameter, v: Parameter },
    /// Rows of a full matrix, the others being 0; which, in ascending order.
    Rows { rows: Vec<u32>, s: Parameter },
    /// A full matrix that is not trained, and may belong to several experts.
    Fixed(Arc<[f32]>),
}

/// A linear map y = W x + b; W is the sum of its parts, b is not trained.
#[derive(Clone, Debug)]
pub(super) struct Map {
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) parts: Vec<Part>,
    pub(super) bias: Option<Vec<f32>>,
}

/// What the backward pass needs of the forward pass: V x of every product, in the order of the parts.
pub(super) type Cache = Vec<Vec<f32>>;

impl Map {
    /// `[n, out]` for `x [n, in]`.
    pub(super) fn forward(&self, x: &[f32]) -> (Vec<f32>, Cache) {
        let n = x.len() / self.inputs;
        let mut y = vec![0.0; n * self.outputs];
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(self.outputs).for_each(|row| row.copy_from_slice(bias));
        }
        let mut cache = Cache::new();
        for part in &self.parts {
            match part {
                Part::Dense(w) => multiply(x, &w.values, self.inputs, true, &mut y),
                Part::Fixed(w) => multiply(x, w, self.inputs, true, &mut y),
                Part::Product { v, .. } if v.values.is_empty() => cache.push(Vec::new()),
                Part::Product { u, v } => {
                    let mut inner = vec![0.0; n * v.rows()];
                    multiply(x, &v.values, self.inputs, false, &mut inner);
                    multiply(&inner, &u.values, u.cols, true, &mut y);
                    cache.push(inner);
                }
                Part::Rows { rows, s } => {
                    let mut some = vec![0.0; n * rows.len()];
                    multiply(x, &s.values, self.inputs, false, &mut some);
                    for (y, some) in
                        y.chunks_exact_mut(self.outputs).zip(some.chunks_exact(rows.len().max(1)))
                    {
                        rows.iter().zip(some).for_each(|(&row, value)| y[row as usize] += value);
                    }
                }
            }
        }
        (y, cache)
    }

    /// Sets the gradients for the gradient `dy [n, out]` of the outputs; returns that of the inputs where it is
    /// `wanted`, else nothing.
    pub(super) fn backward(&mut self, x: &[f32], cache: &Cache, dy: &[f32], wanted: bool) -> Vec<f32> {
        let (n, inputs, outputs) = (x.len() / self.inputs, self.inputs, self.outputs);
        let mut dx = vec![0.0; if wanted { x.len() } else { 0 }];
        if n == 0 {
            self.parameters().into_iter().for_each(Parameter::no_gradient);
            return dx;
        }
        let (x_columns, dy_columns) = (transpose(x, inputs), transpose(dy, outputs));
        let mut cache = cache.iter();
        for part in &mut self.parts {
            match part {
                Part::Dense(w) => {
                    w.set_gradient(&dy_columns, &x_columns, n);
                    if wanted {
                        multiply(dy, &transpose(&w.values, inputs), outputs, true, &mut dx);
                    }
                }
                Part::Fixed(w) => {
                    if wanted {
                        multiply(dy, &transpose(w, inputs), outputs, true, &mut dx);
                    }
                }
                Part::Product { u, v } => {
                    let Some(inner) = cache.next().filter(|inner| !inner.is_empty()) else { continue };
                    u.set_gradient(&dy_columns, &transpose(inner, u.cols), n);
                    let mut d_inner = vec![0.0; inner.len()];
                    multiply(dy, &transpose(&u.values, u.cols), outputs, false, &mut d_inner);
                    v.set_gradient(&transpose(&d_inner, u.cols), &x_columns, n);
                    if wanted {
                        multiply(&d_inner, &transpose(&v.values, inputs), u.cols, true, &mut dx);
                    }
                }
                Part::Rows { rows, s } => {
                    if rows.is_empty() {
                        continue;
                    }
                    let some: Vec<f32> = rows
                        .iter()
                        .flat_map(|&r| &dy_columns[r as usize * n..(r as usize + 1) * n])
                        .copied()
                        .collect();
                    s.set_gradient(&some, &x_columns, n);
                    if wanted {
                        multiply(
                            &transpose(&some, n),
                            &transpose(&s.values, inputs),
                            rows.len(),
                            true,
                            &mut dx,
                        );
                    }
                }
            }
        }
        dx
    }

    /// Everything that is trained, in a fixed order.
    pub(super) fn parameters(&mut self) -> Vec<&mut Parameter> {
        let parts = self.parts.iter_mut().flat_map(|part| match part {
            Part::Dense(w) => vec![w],
            Part::Product { u, v } => vec![u, v],
            Part::Rows { s, .. } => vec![s],
            Part::Fixed(_) => Vec::new(),
        });
        parts.collect()
    }
}

impl Parameter {
    /// Gradient = dyᵀ x for `dy_columns [rows, n]` and `x_columns [cols, n]`.
    fn set_gradient(&mut self, dy_columns: &[f32], x_columns: &[f32], n: usize) {
        self.gradient.resize(self.values.len(), 0.0);
        multiply(dy_columns, x_columns, n, false, &mut self.gradient);
    }

    fn no_gradient(&mut self) {
        self.gradient.clear();
        self.gradient.resize(self.values.len(), 0.0);
    }
}
