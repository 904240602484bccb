//! The table of experts: from forms to descriptors.

use super::arena::Arena;
use super::params::{self, MoeExpert, MoeMatrix};
use super::weights::{LayerMatrix, LayerVector, Placed, place_vector, stack};
use super::{Element, Error, Result};
use crate::architecture::Activation;
use crate::backend::{Expert, Linear, Matrix, Mlp};

/// What all experts of a layer have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Common<'a> {
    pub(super) hidden: usize,
    pub(super) element: Element,
    /// Bases of gate, up and down.
    pub(super) base: [Option<LayerMatrix<'a>>; 3],
}

/// The sizes that a layer's buffers need, and the kernels that it needs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Extent {
    /// Most rows of an expert that multiply x before the hidden vector.
    pub(super) v_in_rows: usize,
    /// The same for down.
    pub(super) v_down_rows: usize,
    /// Most columns of h.
    pub(super) width: usize,
    /// Whether any gate or up, and any down, is added to a base.
    pub(super) base_in: bool,
    pub(super) base_down: bool,
    /// Of the experts that have one.
    pub(super) activation: Option<Activation>,
}

impl Extent {
    /// Most columns of z.
    pub(super) fn z(&self) -> usize {
        self.v_in_rows.max(self.v_down_rows)
    }
}

/// One matrix, taken apart.
struct Parts<'a> {
    /// W, or U.
    weight: LayerMatrix<'a>,
    /// V, and U's rows beside it.
    v: Option<LayerMatrix<'a>>,
    /// Rows of the output, and what is added to them.
    sparse: Option<(&'a [u32], LayerMatrix<'a>)>,
    base: bool,
}

fn parts<'a, W>(matrix: &'a Matrix<W>) -> Parts<'a>
where
    LayerMatrix<'a>: From<&'a W>,
{
    let dense = |weight: &'a W| Parts { weight: weight.into(), v: None, sparse: None, base: false };
    match matrix {
        Matrix::Dense(weight) => dense(weight),
        Matrix::LowRank { u, v } => Parts { v: Some(v.into()), ..dense(u) },
        Matrix::LowRankRows { u, v, rows, s } => {
            Parts { v: Some(v.into()), sparse: Some((rows, s.into())), ..dense(u) }
        }
        Matrix::Delta { u, v } => Parts { v: Some(v.into()), base: true, ..dense(u) },
    }
}

/// Rows that multiply one input, stacked while the maps that use them are described.
#[derive(Default)]
struct Stack<'a> {
    parts: Vec<(usize, LayerMatrix<'a>)>,
    rows: usize,
}

impl<'a> Stack<'a> {
    /// Appends a matrix; returns its first row.
    fn push(&mut self, matrix: LayerMatrix<'a>) -> usize {
        let first = self.rows;
        self.parts.push((first, matrix));
        self.rows += matrix.rows();
        first
    }
}

/// The descriptor of one expert, whose weights are placed on the way.
pub(super) fn describe<'a, W, V>(
    expert: &'a Expert<W, V>,
    name: &str,
    common: Common<'_>,
    extent: &mut Extent,
    arena: &mut Arena<'_>,
) -> Result<MoeExpert>
where
    LayerMatrix<'a>: From<&'a W>,
    LayerVector<'a>: From<&'a V>,
{
    let mut found: MoeExpert = bytemuck::Zeroable::zeroed();
    match expert {
        Expert::Mlp(mlp) => {
            describe_mlp(&mut found, mlp, name, common, arena)?;
            include(extent, &found, mlp.activation, name)?;
        }
        Expert::Constant(vector) => {
            found.form = params::FORM_CONSTANT;
            let what = format!("{name}, constant");
            found.constant = place_vector(vector.into(), common.hidden, &what, arena)?;
        }
        Expert::Alias(_) | Expert::None => found.form = params::FORM_NONE,
    }
    Ok(found)
}

/// Widens a layer's extent by an expert.
fn include(extent: &mut Extent, expert: &MoeExpert, activation: Activation, name: &str) -> Result<()> {
    if extent.activation.is_some_and(|other| other != activation) {
        let expected = "the same activation in all experts of a layer";
        return Err(Error::argument(name, format!("{activation:?}"), expected));
    }
    extent.activation = Some(activation);
    extent.v_in_rows = extent.v_in_rows.max(expert.v_in_rows as usize);
    extent.v_down_rows = extent.v_down_rows.max(expert.v_down_rows as usize);
    extent.width = extent.width.max(expert.width as usize);
    extent.base_in |= (expert.gate.flags | expert.up.flags) & params::BASE != 0;
    extent.base_down |= expert.down.flags & params::BASE != 0;
    Ok(())
}

fn describe_mlp<'a, W, V>(
    found: &mut MoeExpert,
    mlp: &'a Mlp<Linear<Matrix<W>, V>>,
    name: &str,
    common: Common<'_>,
    arena: &mut Arena<'_>,
) -> Result<()>
where
    LayerMatrix<'a>: From<&'a W>,
    LayerVector<'a>: From<&'a V>,
{
    let Common { hidden, element, base } = common;
    if mlp.up.is_some() != mlp.activation.is_gated() {
        let expected = if mlp.up.is_some() { "a gated activation with up" } else { "up" };
        return Err(Error::argument(name, format!("{:?}", mlp.activation), expected));
    }
    let width = parts(&mlp.gate.weight).weight.rows();
    found.form = params::FORM_MLP;
    found.width = size(width, name)?;
    let (mut of_x, mut of_h) = (Stack::default(), Stack::default());
    let mut describe = |what: &str, map, shape, stack: &mut Stack<'a>, base| {
        describe_map(&format!("{name}, {what}"), map, shape, stack, base, element, arena)
    };
    found.gate = describe("gate", &mlp.gate, [width, hidden], &mut of_x, base[0])?;
    match &mlp.up {
        Some(up) => found.up = describe("up", up, [width, hidden], &mut of_x, base[1])?,
        None => found.up.flags = params::ABSENT,
    }
    found.down = describe("down", &mlp.down, [hidden, width], &mut of_h, base[2])?;
    let v_in = stack(&of_x.parts, hidden, element, &format!("{name}, V of gate and up"), arena)?;
    let v_down = stack(&of_h.parts, width, element, &format!("{name}, V of down"), arena)?;
    (found.v_in, found.v_in_ld, found.v_in_rows) = (v_in.address, v_in.stride as i32, size(of_x.rows, name)?);
    (found.v_down, found.v_down_ld, found.v_down_rows) =
        (v_down.address, v_down.stride as i32, size(of_h.rows, name)?);
    Ok(())
}

fn describe_map<'a, W, V>(
    what: &str,
    map: &'a Linear<Matrix<W>, V>,
    [rows, cols]: [usize; 2],
    of_input: &mut Stack<'a>,
    base: Option<LayerMatrix<'_>>,
    element: Element,
    arena: &mut Arena<'_>,
) -> Result<MoeMatrix>
where
    LayerMatrix<'a>: From<&'a W>,
    LayerVector<'a>: From<&'a V>,
{
    let parts = parts(&map.weight);
    let k = parts.v.map_or(cols, |v| v.rows());
    check_shape(what, parts.weight, [rows, k])?;
    let Placed { address, stride } = stack(&[(0, parts.weight)], k, element, what, arena)?;
    let mut found = MoeMatrix {
        weight: address,
        row_slot: 0,
        bias: 0,
        ld: size(stride, what)?,
        k: size(k, what)?,
        z_first: 0,
        flags: 0,
    };
    if let Some(v) = parts.v {
        check_shape(&format!("{what}, V"), v, [k, cols])?;
        of_input.rows = of_input.rows.next_multiple_of(8);
        found.flags |= params::LOW_RANK;
        found.z_first = of_input.push(v) as i32;
    }
    if let Some((ids, sparse)) = parts.sparse {
        check_shape(&format!("{what}, sparse rows"), sparse, [ids.len(), cols])?;
        let slots = row_slots(what, ids, rows, of_input.push(sparse))?;
        found.row_slot = arena.put_values(&slots)?;
    }
    if parts.base {
        let base = base.ok_or_else(|| Error::argument(what, "no base in this layer", "one"))?;
        check_shape(&format!("{what}, base"), base, [rows, cols])?;
        found.flags |= params::BASE;
    }
    if let Some(bias) = &map.bias {
        found.bias = place_vector(bias.into(), rows, &format!("{what}, bias"), arena)?;
    }
    Ok(found)
}

/// For each output, the column of z that is added to it, or −1.
fn row_slots(what: &str, ids: &[u32], rows: usize, first: usize) -> Result<Vec<i32>> {
    let mut slots = vec![-1; rows];
    for (i, &row) in ids.iter().enumerate() {
        let ascending = i == 0 || ids[i - 1] < row;
        let slot = slots.get_mut(row as usize).filter(|_| ascending);
        let expected = || format!("ascending rows below {rows}");
        *slot.ok_or_else(|| Error::argument(what, format!("sparse row {row}"), expected()))? =
            (first + i) as i32;
    }
    Ok(slots)
}

/// The bases of a layer as one expert: gate and up as rows that multiply x, up from the returned row on, and down.
pub(super) fn describe_base(common: Common<'_>, arena: &mut Arena<'_>) -> Result<(MoeExpert, usize)> {
    let Common { hidden, element, base: [gate, up, down] } = common;
    let width = gate.or(up).map_or(down.map_or(0, |m| m.cols()), |m| m.rows());
    let mut found: MoeExpert = bytemuck::Zeroable::zeroed();
    found.form = params::FORM_MLP;
    found.width = size(width, "base")?;
    let mut of_x = Stack::default();
    let mut up_first = 0;
    for (matrix, what) in [(gate, "base of gate"), (up, "base of up")] {
        of_x.rows = of_x.rows.next_multiple_of(8);
        up_first = of_x.rows;
        if let Some(matrix) = matrix {
            check_shape(what, matrix, [width, hidden])?;
            of_x.push(matrix);
        }
    }
    let v_in = stack(&of_x.parts, hidden, element, "base of gate and up", arena)?;
    (found.v_in, found.v_in_ld, found.v_in_rows) =
        (v_in.address, v_in.stride as i32, size(of_x.rows, "base")?);
    if let Some(down) = down {
        check_shape("base of down", down, [hidden, width])?;
        let Placed { address, stride } = stack(&[(0, down)], width, element, "base of down", arena)?;
        found.down.weight = address;
        (found.down.ld, found.down.k) = (size(stride, "base of down")?, size(width, "base of down")?);
    }
    Ok((found, up_first))
}

/// Multiplications for one token: the order in which tiles are dealt out.
pub(super) fn cost(expert: &MoeExpert, hidden: usize) -> u64 {
    let (hidden, width) = (hidden as u64, expert.width as u64);
    let inner = (expert.gate.k + expert.up.k) as u64 * width + expert.down.k as u64 * hidden;
    inner + expert.v_in_rows as u64 * hidden + expert.v_down_rows as u64 * width
}

fn check_shape(what: &str, matrix: LayerMatrix<'_>, expected: [usize; 2]) -> Result<()> {
    let found = [matrix.rows(), matrix.cols()];
    if found != expected {
        return Err(Error::argument(what, format!("{found:?}"), format!("{expected:?}")));
    }
    Ok(())
}

fn size(value: usize, what: &str) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::argument(what, value.to_string(), "less than 2^31"))
}
