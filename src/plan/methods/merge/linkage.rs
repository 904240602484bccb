//! Agglomerative clustering.

/// How far apart two clusters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Linkage {
    /// The mean distance of their members.
    Average,
    /// That of the nearest.
    Single,
    /// That of the farthest.
    Complete,
}

/// One step: the clusters named by their smallest members `a` < `b` become one, which keeps the name `a`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Step {
    pub(super) a: usize,
    pub(super) b: usize,
    /// Their distance.
    pub(super) height: f64,
}

/// Joins the nearest clusters of `points` `[n, width]`, Euclidean distance, until one is left; ties to the smallest pair of
/// names.
pub(super) fn cluster(points: &[f64], n: usize, linkage: Linkage) -> Vec<Step> {
    let width = points.len().checked_div(n).unwrap_or(0);
    let point = |i: usize| &points[i * width..(i + 1) * width];
    let mut distance = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..i {
            let square: f64 = point(i).iter().zip(point(j)).map(|(a, b)| (a - b) * (a - b)).sum();
            distance[i * n + j] = square.sqrt();
            distance[j * n + i] = square.sqrt();
        }
    }
    let mut names: Vec<usize> = (0..n).collect();
    let mut sizes = vec![1.0; n];
    let mut steps = Vec::with_capacity(n.saturating_sub(1));
    while names.len() > 1 {
        let mut best = Step { a: 0, b: 0, height: f64::INFINITY };
        for (i, &a) in names.iter().enumerate() {
            for &b in &names[i + 1..] {
                if distance[a * n + b] < best.height {
                    best = Step { a, b, height: distance[a * n + b] };
                }
            }
        }
        let Step { a, b, .. } = best;
        names.retain(|&name| name != b);
        for &k in names.iter().filter(|k| **k != a) {
            let (x, y) = (distance[k * n + a], distance[k * n + b]);
            let joined = match linkage {
                Linkage::Average => (sizes[a] * x + sizes[b] * y) / (sizes[a] + sizes[b]),
                Linkage::Single => x.min(y),
                Linkage::Complete => x.max(y),
            };
            distance[k * n + a] = joined;
            distance[a * n + k] = joined;
        }
        sizes[a] += sizes[b];
        steps.push(best);
    }
    steps
}

/// The clusters after so many steps that `count` are left, members ascending, in the order of their smallest.
pub(super) fn cut(steps: &[Step], n: usize, count: usize) -> Vec<Vec<usize>> {
    let mut clusters: Vec<Vec<usize>> = (0..n).map(|e| vec![e]).collect();
    for step in &steps[..n - count] {
        let members = std::mem::take(&mut clusters[step.b]);
        clusters[step.a].extend(members);
    }
    clusters.retain(|c| !c.is_empty());
    for cluster in &mut clusters {
        cluster.sort_unstable();
    }
    clusters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_on_a_line() {
        // 0, 1, 3, 7: 0 with 1, those with 3, all.
        let heights = |linkage| cluster(&[0.0, 1.0, 3.0, 7.0], 4, linkage).iter().map(|s| s.height).collect();
        let (average, single, complete): (Vec<f64>, Vec<f64>, Vec<f64>) =
            (heights(Linkage::Average), heights(Linkage::Single), heights(Linkage::Complete));
        assert_eq!(average, [1.0, 2.5, (7.0 + 6.0 + 4.0) / 3.0]);
        assert_eq!(single, [1.0, 2.0, 4.0]);
        assert_eq!(complete, [1.0, 3.0, 7.0]);
        let steps = cluster(&[0.0, 1.0, 3.0, 7.0], 4, Linkage::Average);
        assert_eq!(cut(&steps, 4, 2), [vec![0, 1, 2], vec![3]]);
        assert_eq!(cut(&steps, 4, 4).len(), 4);
    }

    #[test]
    fn equal_distances_join_the_lowest_first() {
        let steps = cluster(&[1.0, 1.0, 1.0, 1.0], 4, Linkage::Average);
        assert_eq!(steps.iter().map(|s| (s.a, s.b)).collect::<Vec<_>>(), [(0, 1), (0, 2), (0, 3)]);
    }
}
