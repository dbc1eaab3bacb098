//! Tensor maps: what `cp.async.bulk.tensor` copies from and to.  The driver's 128 bytes are opaque; these are our own,
//! with the same content, made by [`TensorMap::encode`].

/// How 16-byte pieces are mixed within rows in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    None,
    B32,
    B64,
    B128,
}

impl Swizzle {
    /// The place of a byte: bits 4 to 6 are mixed with those from 7 on.
    pub fn apply(self, at: usize) -> usize {
        match self {
            Swizzle::None => at,
            Swizzle::B32 => at ^ (at >> 3 & 0x10),
            Swizzle::B64 => at ^ (at >> 3 & 0x30),
            Swizzle::B128 => at ^ (at >> 3 & 0x70),
        }
    }
}

/// A tensor in global memory and the box that one copy moves.  The first dim is the innermost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    pub address: u64,
    /// Bytes of an element.
    pub element: u8,
    /// Elements along each dim.
    pub sizes: Vec<u32>,
    /// Bytes from one index to the next, of every dim but the first.
    pub strides: Vec<u64>,
    /// Elements of the box along each dim.
    pub extent: Vec<u16>,
    pub swizzle: Swizzle,
}

const MAGIC: &[u8; 8] = b"SIMTMAP1";

impl TensorMap {
    /// # Errors
    /// What the hardware doesn't allow.
    pub fn new(
        address: u64,
        element: u8,
        sizes: &[u32],
        strides: &[u64],
        extent: &[u16],
        swizzle: Swizzle,
    ) -> Result<TensorMap, String> {
        let n = sizes.len();
        if !(1..=5).contains(&n) || strides.len() != n - 1 || extent.len() != n {
            return Err("a tensor map has 1 to 5 dims, one stride fewer and a box of as many".into());
        }
        if !matches!(element, 1 | 2 | 4 | 8) {
            return Err(format!("elements of {element} bytes: 1, 2, 4 or 8 are possible"));
        }
        if !address.is_multiple_of(16) || strides.iter().any(|s| !s.is_multiple_of(16)) {
            return Err("address and strides must be multiples of 16 bytes".into());
        }
        if extent.iter().any(|&e| e == 0 || e > 256) {
            return Err("sides of the box are 1 to 256".into());
        }
        let inner = usize::from(extent[0]) * usize::from(element);
        let most = match swizzle {
            Swizzle::None => usize::MAX,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        };
        if !inner.is_multiple_of(16) || inner > most {
            return Err(format!("the box's inner side of {inner} bytes: it must be a multiple of 16, at most {most}"));
        }
        Ok(TensorMap { address, element, sizes: sizes.into(), strides: strides.into(), extent: extent.into(), swizzle })
    }

    /// The 128 bytes of a kernel's parameter.
    pub fn encode(&self) -> [u8; 128] {
        let mut out = [0u8; 128];
        out[..8].copy_from_slice(MAGIC);
        out[8..16].copy_from_slice(&self.address.to_le_bytes());
        out[16] = self.sizes.len() as u8;
        out[17] = self.element;
        out[18] = self.swizzle as u8;
        for (i, s) in self.sizes.iter().enumerate() {
            out[20 + 4 * i..24 + 4 * i].copy_from_slice(&s.to_le_bytes());
        }
        for (i, s) in self.strides.iter().enumerate() {
            out[40 + 8 * i..48 + 8 * i].copy_from_slice(&s.to_le_bytes());
        }
        for (i, s) in self.extent.iter().enumerate() {
            out[72 + 2 * i..74 + 2 * i].copy_from_slice(&s.to_le_bytes());
        }
        out
    }

    /// Reads what `encode` wrote.
    pub fn decode(b: &[u8]) -> Option<TensorMap> {
        let b: &[u8; 128] = b.try_into().ok()?;
        if &b[..8] != MAGIC {
            return None;
        }
        let n = usize::from(b[16]);
        let u64_at = |i: usize| b[i..i + 8].try_into().map(u64::from_le_bytes).ok();
        let sizes: Option<Vec<u32>> =
            (0..n).map(|i| b[20 + 4 * i..24 + 4 * i].try_into().map(u32::from_le_bytes).ok()).collect();
        let strides: Option<Vec<u64>> = (0..n.saturating_sub(1)).map(|i| u64_at(40 + 8 * i)).collect();
        let extent: Vec<u16> = (0..n).map(|i| u16::from_le_bytes([b[72 + 2 * i], b[73 + 2 * i]])).collect();
        let swizzle = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128].into_iter().nth(usize::from(b[18]))?;
        TensorMap::new(u64_at(8)?, b[17], &sizes?, &strides?, &extent, swizzle).ok()
    }

    /// Bytes of a box.
    pub fn bytes(&self) -> usize {
        self.extent.iter().map(|&e| usize::from(e)).product::<usize>() * usize::from(self.element)
    }

    /// Pieces of up to 16 bytes of the box at `coords`: (offset in shared memory before swizzling, address of the first
    /// element, bytes inside the tensor).
    pub fn pieces(&self, coords: &[i32]) -> Vec<(usize, u64, Option<usize>)> {
        let element = usize::from(self.element);
        let per = 16 / element;
        let inner = usize::from(self.extent[0]);
        let rows: usize = self.extent[1..].iter().map(|&e| usize::from(e)).product();
        let mut out = Vec::with_capacity(rows * inner / per);
        for row in 0..rows {
            let (mut rest, mut inside, mut address) = (row, true, self.address as i64);
            for (d, &c) in coords.iter().enumerate().skip(1) {
                let i = i64::from(c) + (rest % usize::from(self.extent[d])) as i64;
                rest /= usize::from(self.extent[d]);
                inside &= (0..i64::from(self.sizes[d])).contains(&i);
                address += i * self.strides[d - 1] as i64;
            }
            for col in (0..inner).step_by(per) {
                let first = i64::from(coords[0]) + col as i64;
                let at = (row * inner + col) * element;
                // A piece is inside, outside, or across an end: then element by element.
                let n = i64::from(self.sizes[0]);
                if inside && first >= 0 && first + per as i64 <= n {
                    out.push((at, (address + first * element as i64) as u64, Some(16)));
                } else {
                    for k in 0..per {
                        let i = first + k as i64;
                        let ok = inside && (0..n).contains(&i);
                        let from = (address + i * element as i64) as u64;
                        out.push((at + k * element, from, if ok { Some(element) } else { None }));
                    }
                }
            }
        }
        out
    }
}
