//! The causal convolution and its gradient: tokens walked with the last inputs in registers; one token by itself.

use super::slots::Slots;
use super::{Cuda, Site, Unsupported};
use crate::cuda::expr::Expr;
use crate::cuda::form::{Call, Condition, Form, Operand};
use crate::cuda::stub::Stub;
use rambac_ir::ops::*;
use rambac_ir::{DType, Dim};

/// How a block of 128 threads covers channels and time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    /// Channels a thread owns.
    vec: usize,
    /// Threads side by side.
    lanes: usize,
    /// Threads one behind the other in time.
    rows: usize,
    /// Tokens a thread walks.
    steps: usize,
}

const THREADS: usize = 128;

impl Tile {
    /// `most`: channels that can be moved at once.  `budget`: registers for weights, of which a channel takes `k`.
    fn choose(channels: usize, k: usize, most: usize, budget: usize, steps: usize) -> Tile {
        let room = (budget / k).max(1);
        let vec = most.min(1 << room.ilog2());
        let lanes = channels.div_ceil(vec).next_power_of_two().min(32);
        Tile { vec, lanes, rows: THREADS / lanes, steps }
    }
    /// Tokens of a block.
    fn tokens(self) -> usize {
        self.rows * self.steps
    }
    fn blocks_of_channels(self, channels: usize) -> usize {
        channels.div_ceil(self.lanes * self.vec)
    }
}

/// Sizes of a convolution.
struct Conv {
    n: Dim,
    l: Dim,
    channels: usize,
    k: usize,
    /// Of x and y.
    dtype: DType,
    /// Of weights and states.
    exact: DType,
    /// Channels that every operand allows to move at once.
    most: usize,
    /// The weights begin at a multiple of 16 bytes.
    aligned: bool,
    silu: bool,
}

const X: Operand = Operand::Input(0);
const W: Operand = Operand::Input(1);
const BIAS: Operand = Operand::Input(2);
const S0: Operand = Operand::Input(3);
const DY: Operand = Operand::Input(4);
const DS: Operand = Operand::Input(5);

impl Conv {
    /// `contiguous` are vectors by channels.
    fn new(site: &Site, silu: bool, rows: &[Operand], contiguous: &[Operand]) -> Result<Conv, Unsupported> {
        contiguous.iter().chain(&[W]).try_for_each(|&at| site.contiguous(at))?;
        let shape = &site.inputs[0].ty.shape;
        let (channels, k, dtype) = (site.int(X, 2)?, site.int(W, 2)?, site.dtype(X));
        let even = 1 << channels.max(1).trailing_zeros().min(4);
        let piece = 16 / dtype.size();
        let most = site.vector(&[rows, contiguous].concat(), even.min(piece));
        let aligned = site.vector(&[W], piece) == piece;
        let exact = site.dtype(W);
        Ok(Conv { n: shape[0].clone(), l: shape[1].clone(), channels, k, dtype, exact, most, aligned, silu })
    }
    fn stub(&self, template: &'static str, t: Tile, threads: usize) -> Stub {
        let stub = Stub::new("conv", template, threads).tag(self.dtype);
        let stub = if self.exact == self.dtype { stub } else { stub.tag(self.exact) };
        stub.int("channels", self.channels)
            .tag(format!("c{}", self.channels))
            .int("k", self.k)
            .tag(format!("k{}", self.k))
            .flag("silu", self.silu)
            .tag(if self.silu { "silu" } else { "linear" })
            .flag("aligned", self.aligned)
            .int("vec", t.vec)
            .tag(format!("v{}{}", t.vec, if self.aligned { "" } else { "u" }))
            .int("lanes", t.lanes)
            .int("rows", t.rows)
            .int("steps", t.steps)
            .tag(format!("t{}x{}", t.rows, t.steps))
    }
    fn blocks_of(&self, t: Tile) -> usize {
        t.blocks_of_channels(self.channels)
    }
    fn tiles(&self, t: Tile) -> Expr {
        Expr::from(&self.l).ceil_div(t.tokens()).max(1)
    }
    /// Long walks where there are enough of them: the tokens read twice are few then.
    fn long(&self, site: &Site, t: Tile) -> Condition {
        let vectors = Expr::product(&[self.n.clone(), self.l.clone()]) * self.channels.div_ceil(t.vec);
        Condition::AtLeast(vectors, Expr::int(t.steps * 512 * site.target.sms))
    }
}

/// Tokens of a thread: long and short walks.
const STEPS: [usize; 3] = [64, 32, 8];
const SHORT: usize = STEPS[STEPS.len() - 1];

impl Cuda for CausalConv1d {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let (y, s) = (Operand::Output(0), Operand::Output(1));
        let c = Conv::new(site, self.silu, &[X, y], &[BIAS, S0, s])?;
        let (x_stride, y_stride) = (site.row_stride(X, 2)?, site.row_stride(y, 2)?);
        let operands = |stub: Stub| {
            stub.read("x", c.dtype, X)
                .i64("x_stride", x_stride.clone())
                .read("w", c.exact, W)
                .read("bias", c.exact, BIAS)
                .read("s0", c.exact, S0)
                .write("y", c.dtype, y)
                .i64("y_stride", y_stride.clone())
                .write("s", c.exact, s)
        };
        // Few channels a thread: more threads fit, and they hide more than wider accesses save (seen on an H100).
        let tile = |steps| Tile::choose(c.channels, c.k, c.most.min(4), 32, steps);
        let mut forms = vec![];
        if c.l.as_int().is_none_or(|l| l == 1) {
            let t = Tile { rows: 1, ..tile(1) };
            let stub = operands(c.stub("causal_conv_step", t, t.lanes));
            let l = stub.launch((c.blocks_of(t), &c.n, 1));
            let why = format!("one token: a thread has {} channels", t.vec);
            let form = Form::new("causal_conv_step", why, vec![l.into()]);
            let l = Expr::from(&c.l);
            let one = Condition::AtLeast(l.clone(), Expr::int(1));
            forms.push(form.needs(one).needs(Condition::Below(l, Expr::int(2))));
        }
        for steps in STEPS {
            let t = tile(steps);
            let stub =
                operands(c.stub("causal_conv", t, THREADS)).blocks_per_sm(if c.dtype.size() == 2 { 6 } else { 4 });
            let l = stub.i32("l", &c.l).launch((c.tiles(t), c.blocks_of(t), &c.n));
            let why = format!("a thread walks {steps} tokens of {} channels; {} are read twice", t.vec, c.k - 1);
            let form = Form::new("causal_conv", why, vec![l.into()]);
            forms.push(if steps == SHORT { form } else { form.when(c.long(site, t)) });
        }
        Ok(forms)
    }
}

impl Cuda for CausalConv1dGrad {
    fn forms(&self, site: &Site) -> Result<Vec<Form>, Unsupported> {
        let [dx, dw, dbias, ds0] = [0, 1, 2, 3].map(Operand::Output);
        let c = Conv::new(site, self.silu, &[X, DY, dx], &[BIAS, S0, DS, ds0])?;
        site.contiguous(dw)?;
        site.contiguous(dbias)?;
        let slots = Operand::Workspace(0);
        let mut forms = vec![];
        // By registers (seen: 128 where x is of 16 bits and the rest f32, more elsewhere).
        let fits_four = c.dtype.size() == 2 && c.exact == DType::F32;
        for steps in STEPS {
            let t = Tile::choose(c.channels, c.k, c.most.min(4), 16, steps);
            let grad = c
                .stub("causal_conv_grad", t, THREADS)
                .blocks_per_sm(if fits_four && steps != SHORT { 4 } else { 3 })
                .read("x", c.dtype, X)
                .i64("x_stride", site.row_stride(X, 2)?)
                .read("w", c.exact, W)
                .read("bias", c.exact, BIAS)
                .read("s0", c.exact, S0)
                .read("dy", c.dtype, DY)
                .i64("dy_stride", site.row_stride(DY, 2)?)
                .read("ds", c.exact, DS)
                .write("dx", c.dtype, dx)
                .i64("dx_stride", site.row_stride(dx, 2)?)
                .write("ds0", c.exact, ds0)
                .write("slots", DType::F32, slots)
                .i32("l", &c.l)
                .launch((c.tiles(t), c.blocks_of(t), &c.n));
            // A slot is [k + 1, channels]: the weights' rows, then the bias.
            let count = c.tiles(t) * Expr::from(&c.n);
            let size = (c.k + 1) * c.channels;
            let part = |first: usize, rows: usize| Slots {
                at: slots,
                first,
                count: count.clone(),
                stride: size.into(),
                rows: rows.into(),
                cols: c.channels.into(),
            };
            let calls: Vec<Call> = vec![
                grad.into(),
                part(0, c.k).sum(site, dw, 1, c.k).into(),
                part(c.k * c.channels, 1).sum(site, dbias, 0, 1).into(),
            ];
            let why = format!("a thread walks {steps} tokens of {} channels, weights' gradients per block", t.vec);
            let form = Form::new("causal_conv_grad", why, calls).with("slots", DType::F32, count * size);
            forms.push(if steps == SHORT { form } else { form.when(c.long(site, t)) });
        }
        Ok(forms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fill_a_block_and_keep_registers() {
        // The 370M model in bf16: 2304 channels, kernel 4.
        assert_eq!(Tile::choose(2304, 4, 8, 32, 32), Tile { vec: 8, lanes: 32, rows: 4, steps: 32 });
        assert_eq!(Tile::choose(2304, 4, 8, 16, 32).vec, 4);
        assert_eq!(Tile::choose(2304, 4, 8, 32, 32).blocks_of_channels(2304), 9);
        // Few channels: more threads in time.
        assert_eq!(Tile::choose(10, 4, 2, 32, 8), Tile { vec: 2, lanes: 8, rows: 16, steps: 8 });
        assert_eq!(Tile::choose(64, 100, 4, 32, 8).vec, 1);
    }
}
