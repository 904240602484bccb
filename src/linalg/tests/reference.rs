//! Agreement with numbers that an independent implementation computed for a small trained Mixtral.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use super::*;

struct File(Vec<u8>);

impl File {
    fn f64(&self, name: &str) -> (Vec<usize>, Vec<f64>) {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let t = tensors.tensor(name).unwrap();
        let data = match t.dtype() {
            Dtype::F64 => t.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            Dtype::BF16 => {
                t.data().as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f64()).collect()
            }
            other => panic!("{name} is {other:?}"),
        };
        (t.shape().to_vec(), data)
    }

    fn matrix(&self, name: &str) -> Matrix {
        let (shape, data) = self.f64(name);
        Matrix::new(shape[0], shape[1], data).unwrap()
    }
}

/// A file of the material that lies beside the checkout; nothing where there is none.
fn open(path: &str) -> Option<File> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
    let file = std::fs::read(&path).ok().map(File);
    if file.is_none() {
        eprintln!("skipped: there is no {}", path.display());
    }
    file
}

const FAMILIES: [&str; 3] = ["w1", "w3", "w2"];

fn weight(model: &File, layer: usize, expert: usize, family: usize) -> Matrix {
    let family = FAMILIES[family];
    model.matrix(&format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{family}.weight"))
}

#[test]
fn plain_singular_values() {
    let (Some(model), Some(expected)) =
        (open("models/mixtral/model.safetensors"), open("reference/mixtral/low_rank.safetensors"))
    else {
        return;
    };
    let (shape, values) = expected.f64("plain_singular_values");
    let (_, curves) = expected.f64("plain_loss_curve");
    let (experts, n) = (shape[1], shape[3]);
    let mut worst = 0.0_f64;
    for index in 0..values.len() / n {
        let (layer, expert, family) = (index / 3 / experts, index / 3 % experts, index % 3);
        let w = weight(&model, layer, expert, family);
        let values = &values[index * n..][..n];
        let curve = &curves[index * (n + 1)..][..=n];
        for (a, b) in spectrum(&w, None).unwrap().iter().zip(values) {
            worst = worst.max((a.sqrt() - b).abs() / values[0]);
        }
        if layer == 0 {
            for rank in [21, 42, 64] {
                let f = truncated_svd(&w, rank).unwrap();
                worst = worst.max((f.loss - curve[rank]).abs() / curve[0]);
            }
        }
    }
    eprintln!("largest difference {worst:e}");
    assert!(worst < 1e-10);
}

#[test]
fn whitened_eigenvalues() {
    let (Some(model), Some(expected), Some(moments)) = (
        open("models/mixtral/model.safetensors"),
        open("reference/mixtral/low_rank.safetensors"),
        open("reference/mixtral/stats.safetensors"),
    ) else {
        return;
    };
    let (shape, values) = expected.f64("whitened_eigenvalues");
    let (_, curves) = expected.f64("whitened_loss_curve");
    let (_, plain_curves) = expected.f64("plain_data_loss_curve");
    let n = shape[3];
    let (gram_shape, grams) = moments.f64("gram_Cx.layer0");
    let dim = gram_shape[1];
    let mut worst = 0.0_f64;
    for expert in 0..gram_shape[0] {
        let c = Matrix::new(dim, dim, grams[expert * dim * dim..][..dim * dim].to_vec()).unwrap();
        for family in [0, 1] {
            let w = weight(&model, 0, expert, family);
            let index = expert * 3 + family;
            let values = &values[index * n..][..n];
            let curve = &curves[index * (n + 1)..][..=n];
            let plain_curve = &plain_curves[index * (n + 1)..][..=n];
            for (a, b) in spectrum(&w, Some(&c)).unwrap().iter().zip(values) {
                worst = worst.max((a - b).abs() / curve[0]);
            }
            for rank in [0, 21, 42, 64, 128] {
                let f = whitened_svd(&w, &c, rank).unwrap();
                let measured = data_loss(&w, &product(&f), &c).unwrap();
                worst = worst.max((measured - curve[rank]).abs() / curve[0]);
                let plain = truncated_svd(&w, rank).unwrap();
                let measured = data_loss(&w, &product(&plain), &c).unwrap();
                worst = worst.max((measured - plain_curve[rank]).abs() / curve[0]);
            }
        }
    }
    eprintln!("largest difference {worst:e}");
    assert!(worst < 1e-9);
}
