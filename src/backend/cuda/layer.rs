//! A MoE layer, prepared once.

use super::arena::Arena;
use super::experts::{Common, Extent, cost, describe, describe_base};
use super::params::{self, MoeExpert, MoeRouteParams};
use super::router::{self, LayerRouter, RouterParts};
use super::weights::{LayerMatrix, LayerVector};
use super::{Block, Element, Error, Memory, Result};
use crate::architecture::{Activation, WeightTarget};
use crate::backend::{Base, Expert};
use crate::checkpoint::Tensor;

/// An expert that every token passes.
#[derive(Debug)]
pub struct SharedExpert<'a, W, V> {
    /// The expert.
    pub expert: &'a Expert<W, V>,
    /// `[hidden]`: its output is multiplied by the sigmoid of this vector's product with the token (Qwen2-MoE).
    pub gate: Option<&'a Tensor>,
}

/// What a layer is made of. `W` and `V` are matrices and vectors on the host ([`Weight`](crate::checkpoint::Weight) and
/// [`Tensor`]: copied, in the layer's element type) or on the device ([`DeviceMatrix`](super::DeviceMatrix) and
/// [`DeviceVector`](super::DeviceVector): used where they lie; they must outlive the layer).
#[derive(Debug)]
pub struct LayerSpec<'a, W, V> {
    /// Width of a token, 1 to 67 107 840. Where it is no multiple of 8 (4 in f32), rows of tokens need gaps between them: each
    /// begins at a multiple of 16 bytes.
    pub hidden: usize,
    /// Type of activations and weights.
    pub element: Element,
    /// Experts per token, without the shared one: 1 to 32, and no more than there are.
    pub top_k: usize,
    /// The experts, in any mixture of forms; all with the same activation. With the shared one, 1024 at most.
    ///
    /// Of device matrices, the factors that multiply the same input must be rows of one matrix: V of gate, its sparse
    /// rows, V of up, its sparse rows, each V from a multiple of 8 rows on and zeros in between.
    pub experts: &'a [Expert<W, V>],
    /// Bases of gate, up and down for experts that are a base plus a difference.
    pub base: &'a Base<W>,
    /// Expert parallelism: for each expert of the model its index in `experts`, or `None` where it is elsewhere; `ids`
    /// and router rows are the model's. Tokens of experts that are elsewhere get nothing for them: sum over the ranks.
    pub expert_map: Option<&'a [Option<usize>]>,
    /// The shared expert, if it is to be run with the others.
    pub shared: Option<SharedExpert<'a, W, V>>,
    /// How logits become experts and weights; without it, the caller gives both.
    pub router: Option<LayerRouter<'a>>,
    /// What combine weights multiply.
    pub target: WeightTarget,
}

/// A prepared layer. Immutable; any number of streams may run it at the same time, each with a workspace of its own.
#[derive(Debug)]
pub struct MoeLayer<B> {
    /// Weights that were copied, and all tables.
    block: B,
    pub(super) tables: Tables,
}

/// Addresses and sizes.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    pub(super) hidden: usize,
    pub(super) element: Element,
    /// Rows of the tables, the shared expert included.
    pub(super) rows: usize,
    /// Router rows.
    pub(super) experts: usize,
    pub(super) slots: usize,
    pub(super) target: WeightTarget,
    pub(super) extent: Extent,
    pub(super) activation: Activation,
    pub(super) descriptors: u64,
    pub(super) canonical: u64,
    pub(super) order: u64,
    pub(super) base: Option<BaseTable>,
    pub(super) router: Option<RouterTable>,
}

/// The shared bases, as a table of one expert.
#[derive(Clone, Copy, Debug)]
pub(super) struct BaseTable {
    pub(super) descriptors: u64,
    pub(super) order: u64,
    /// Columns of the base of gate and up; 0 where there is none.
    pub(super) columns: usize,
    /// Where up begins in them.
    pub(super) up_first: usize,
}

/// The router: its parameters without those of a call.
#[derive(Clone, Copy, Debug)]
pub(super) struct RouterTable {
    pub(super) params: MoeRouteParams,
    /// Whether the layer makes the logits.
    pub(super) has_weight: bool,
    /// f32 `[rows, hidden]`.
    pub(super) weight: u64,
    pub(super) weight_stride: usize,
    /// The same in the layer's element type.
    pub(super) parts: RouterParts,
    /// Logits of a token.
    pub(super) rows: usize,
}

impl<B: Block> MoeLayer<B> {
    /// Prepares a layer: one allocation, into which weights of the host and all tables are copied.
    ///
    /// # Errors
    /// Names the expert and matrix that does not fit, with what would; the device where it fails.
    pub fn new<'a, W, V>(memory: &impl Memory<Block = B>, spec: &LayerSpec<'a, W, V>) -> Result<Self>
    where
        LayerMatrix<'a>: From<&'a W>,
        LayerVector<'a>: From<&'a V>,
    {
        let mut counting = Arena::counting();
        tables(spec, &mut counting)?;
        let block = memory.allocate(counting.used()?)?;
        let mut write = |start: usize, bytes: &[u8]| block.write(start, bytes);
        let tables = tables(spec, &mut Arena::writing(block.address(), &mut write))?;
        Ok(MoeLayer { block, tables })
    }

    /// Bytes of device memory that the layer holds, borrowed weights not among them.
    pub fn bytes(&self) -> usize {
        self.block.bytes()
    }
}

impl<B> MoeLayer<B> {
    /// Experts of the model: valid ids are below this. With a shared expert, this is the shared expert's id.
    pub fn experts(&self) -> usize {
        self.tables.experts
    }

    /// Ids and weights of a token: the experts per token, and one more with a shared expert.
    pub fn slots(&self) -> usize {
        self.tables.slots
    }

    /// Logits of a token, if the layer has a router: the experts, and one more with a gated shared expert.
    pub fn logits(&self) -> Option<usize> {
        self.tables.router.map(|router| router.rows)
    }

    /// Width of a token.
    pub fn hidden(&self) -> usize {
        self.tables.hidden
    }

    /// Type of activations.
    pub fn element(&self) -> Element {
        self.tables.element
    }
}

fn tables<'a, W, V>(spec: &LayerSpec<'a, W, V>, arena: &mut Arena<'_>) -> Result<Tables>
where
    LayerMatrix<'a>: From<&'a W>,
    LayerVector<'a>: From<&'a V>,
{
    let &LayerSpec { hidden, element, top_k, experts: local, .. } = spec;
    let experts = spec.expert_map.map_or(local.len(), <[_]>::len);
    let shared = usize::from(spec.shared.is_some());
    let rows = experts + shared;
    check_limits(hidden, experts, rows, top_k)?;

    let base = spec.base.each_ref().map(|matrix| matrix.as_ref().map(LayerMatrix::from));
    let common = Common { hidden, element, base };
    let mut extent = Extent::default();
    let mut table = vec![bytemuck::Zeroable::zeroed(); rows];
    let (place, canonical) = places(local, spec.expert_map, shared)?;
    for (e, expert) in local.iter().enumerate() {
        let described = describe(expert, &format!("expert {e}"), common, &mut extent, arena)?;
        if let Some(place) = place[e] {
            table[place] = described;
        }
    }
    if let Some(shared) = &spec.shared {
        table[experts] = describe(shared.expert, "shared expert", common, &mut extent, arena)?;
    }
    if extent.base_in || extent.base_down {
        check_base_target(spec.target)?;
    }
    let base = (extent.base_in || extent.base_down).then(|| base_table(common, arena)).transpose()?;
    let router = spec.router.as_ref().map(|router| {
        let gate = spec.shared.as_ref().and_then(|shared| shared.gate);
        let shared = spec.shared.is_some();
        router::place(
            router,
            router::Sizes { hidden, element, experts, top_k, shared },
            gate,
            spec.target,
            arena,
        )
    });
    Ok(Tables {
        hidden,
        element,
        rows,
        experts,
        slots: top_k + shared,
        target: spec.target,
        extent,
        activation: extent.activation.unwrap_or_default(),
        descriptors: arena.put_values(&table)?,
        canonical: arena.put_values(&canonical)?,
        order: arena.put_values(&order(&table, hidden))?,
        base,
        router: router.transpose()?,
    })
}

/// Widest token, 2^26 − 1024: its columns are the second dimension of the grid of combine, of which a device takes 65535
/// blocks.
const MOST_HIDDEN: usize = 65535 * params::COMBINE_COLS;

fn check_limits(hidden: usize, experts: usize, rows: usize, top_k: usize) -> Result<()> {
    if hidden == 0 || hidden > MOST_HIDDEN {
        return Err(Error::argument("hidden", hidden.to_string(), format!("1 to {MOST_HIDDEN}")));
    }
    if experts == 0 || rows > params::MAX_EXPERTS {
        let expected = format!("1 to {}, the shared expert included", params::MAX_EXPERTS);
        return Err(Error::argument("experts", rows.to_string(), expected));
    }
    let most = params::MAX_TOP_K.min(experts);
    if top_k == 0 || top_k > most {
        return Err(Error::argument("top_k", top_k.to_string(), format!("1 to {most}")));
    }
    Ok(())
}

fn check_base_target(target: WeightTarget) -> Result<()> {
    match target {
        WeightTarget::Output => Ok(()),
        WeightTarget::Input => {
            let expected = "experts without a base where combine weights multiply inputs";
            Err(Error::argument("experts", "a base plus a difference", expected))
        }
    }
}

/// For each local expert its row in the tables, if it has one, and for each row the row whose weights it runs, or −1.
fn places<W, V>(
    local: &[Expert<W, V>],
    map: Option<&[Option<usize>]>,
    shared: usize,
) -> Result<(Vec<Option<usize>>, Vec<i32>)> {
    let rows = map.map_or(local.len(), <[_]>::len);
    let at = |row: usize| map.map_or(Some(row), |map| map[row]);
    let mut place = vec![None; local.len()];
    for row in (0..rows).rev() {
        if let Some(e) = at(row) {
            let expected = || format!("an index below {}", local.len());
            let place = place.get_mut(e).ok_or_else(|| {
                Error::argument(format!("expert_map of expert {row}"), e.to_string(), expected())
            })?;
            *place = Some(row);
        }
    }
    let canonical = |row: usize| -> Result<i32> {
        let Some(e) = at(row) else { return Ok(-1) };
        let target = match &local[e] {
            Expert::Alias(of) => {
                let valid = local.get(*of).is_some_and(|target| !matches!(target, Expert::Alias(_)));
                let target = place.get(*of).copied().flatten().filter(|_| valid);
                let expected = "an expert that is here and no alias itself";
                target
                    .ok_or_else(|| Error::argument(format!("expert {e}, alias"), of.to_string(), expected))?
            }
            Expert::None => return Ok(-1),
            _ => place[e].unwrap_or(row),
        };
        Ok(target as i32)
    };
    let mut table = (0..rows).map(canonical).collect::<Result<Vec<_>>>()?;
    table.extend((0..shared).map(|_| rows as i32));
    Ok((place, table))
}

/// The rows of the table, costly experts first.
fn order(table: &[MoeExpert], hidden: usize) -> Vec<i32> {
    let mut order: Vec<i32> = (0..table.len() as i32).collect();
    order.sort_by_key(|&row| std::cmp::Reverse(cost(&table[row as usize], hidden)));
    order
}

fn base_table(common: Common<'_>, arena: &mut Arena<'_>) -> Result<BaseTable> {
    let (base, up_first) = describe_base(common, arena)?;
    Ok(BaseTable {
        descriptors: arena.put_values(&[base])?,
        order: arena.put_values(&[0i32])?,
        columns: base.v_in_rows as usize,
        up_first,
    })
}
