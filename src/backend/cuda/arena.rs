//! Places for parts of one block of memory. What is laid out is laid out twice by the same code: first to count the
//! bytes, then, with the block there, for the addresses.

use super::{Error, Result};

/// Every part begins at a multiple of this many bytes.
pub(super) const ALIGNMENT: u64 = 256;

/// Writes bytes at a distance from the block's beginning.
pub(super) type Write<'a> = &'a mut dyn FnMut(usize, &[u8]) -> Result<()>;

/// Hands out a block from its beginning on.
pub(super) struct Arena<'a> {
    base: u64,
    used: u64,
    write: Option<Write<'a>>,
}

impl<'a> Arena<'a> {
    /// Counts; the addresses are distances from 0.
    pub(super) fn counting() -> Self {
        Self::at(0)
    }

    /// Hands out memory from `base` on, which is a multiple of [`ALIGNMENT`].
    pub(super) fn at(base: u64) -> Self {
        Arena { base, used: 0, write: None }
    }

    /// The same, and writes what is put there.
    pub(super) fn writing(base: u64, write: Write<'a>) -> Self {
        Arena { base, used: 0, write: Some(write) }
    }

    /// Bytes handed out.
    pub(super) fn used(&self) -> Result<usize> {
        usize::try_from(self.used).map_err(|_| too_large())
    }

    /// The address of `count` elements of `size` bytes.
    pub(super) fn reserve(&mut self, count: usize, size: usize) -> Result<u64> {
        let start = self.used;
        let bytes = (count as u64).checked_mul(size as u64);
        let end = bytes.and_then(|n| start.checked_add(n)?.checked_next_multiple_of(ALIGNMENT));
        self.used = end.filter(|&end| end < 1 << 60).ok_or_else(too_large)?;
        Ok(self.base + start)
    }

    /// The address of `count` elements of `size` bytes, whose content `fill` makes where it is written.
    pub(super) fn put(
        &mut self,
        count: usize,
        size: usize,
        fill: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<u64> {
        let address = self.reserve(count, size)?;
        if let Some(write) = &mut self.write
            && count > 0
        {
            write((address - self.base) as usize, &fill()?)?;
        }
        Ok(address)
    }

    /// The address of these values.
    pub(super) fn put_values<T: bytemuck::NoUninit>(&mut self, values: &[T]) -> Result<u64> {
        self.put(values.len(), size_of::<T>(), || Ok(bytemuck::cast_slice(values).to_vec()))
    }
}

fn too_large() -> Error {
    Error::argument("memory", "more than 2^60 bytes", "a layer and a number of tokens that fit into memory")
}
